"""From the plan to batches on a worker: one long Ray Data pass over all epochs.

Ray Data has no resumable iterator (ray#37633, ray#48224). Its dataset is therefore built anew at
each start of the workers, from the plan of what the ledger does not hold yet.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from jaxtyping import Int64
from ray.data import DataIterator, ExecutionOptions, ExecutionResources, TaskPoolStrategy

from distrl.contract import Batch
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger, UnitWork, plan
from distrl.data.samples import BatchMaker, Samples
from distrl.data.units import UnitReader
from distrl.ops.ragged import Ragged
from distrl.schema import Manifest


@dataclass(frozen=True, slots=True)
class Consumed:
    """Places in the plan of the samples of one batch."""

    epoch: Int64[np.ndarray, " n"]
    shard: Int64[np.ndarray, " n"]
    serial: Int64[np.ndarray, " n"]


def training_dataset(
    manifest: Manifest, config: DataConfig, *, seed: int, epochs: int, ledger: Ledger
) -> ray.data.Dataset:
    """Everything that is still to train on, as one dataset.

    Args:
        manifest: Of the store.
        config: How to read it.
        seed: Fixes the order of units, and of samples in each.
        epochs: Passes over the store, those already made included.
        ledger: What is trained on already.
    """
    units = plan(manifest, config, seed=seed, epochs=epochs, ledger=ledger)
    rows = [{"epoch": u.epoch, "shard": u.shard, "done": np.array(u.done).tolist()} for u in units]
    reader = UnitReader(manifest, config, seed)
    if not rows:
        # A dataset must have its columns even when nothing is left to read.
        rows = [{"epoch": -1, "shard": -1, "done": []}]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _ReadUnits(reader),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=TaskPoolStrategy(size=config.read_tasks),
        num_cpus=config.read_cpus,
    )


@dataclass(frozen=True, slots=True)
class _ReadUnits:
    """Reads the unit of each row that it is given."""

    reader: UnitReader

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        for unit in units.to_pylist():
            if unit["epoch"] >= 0:
                done = [(start, stop) for start, stop in unit["done"]]
                yield from self.reader.read(UnitWork(unit["epoch"], unit["shard"], done))


class StreamSplit(ray.train.DataConfig):
    """Deals blocks to workers as they come, and drops none.

    Ray's own split is equal: it drops rows at the end so that ranks take as many steps. Here all
    rows are served, and the loop keeps ranks in step by an empty batch for those that have run out.
    """

    def __init__(self, read_ahead_bytes: int) -> None:
        limits = ExecutionResources.for_limits(object_store_memory=read_ahead_bytes)
        super().__init__(execution_options=ExecutionOptions(resource_limits=limits))

    def configure(  # noqa: D102
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[dict[str, DataIterator]]:
        shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options = self._resolve_execution_options(name)
            parts = dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for shard, part in zip(shards, parts, strict=True):
                shard[name] = part
        return shards


class Batches(Iterator[tuple[Batch, Consumed]]):
    """Batches made in a thread beside training, a few ahead; counts the seconds of waiting."""

    def __init__(self, tables: Iterator[pa.Table], maker: BatchMaker, prefetch: int) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._started = False
        self._ended = False
        self.start_s = 0.0
        """Seconds until the first batch, which no prefetch can hide."""
        self.waited_s = 0.0
        """Seconds that `next` has waited for the batches after it."""
        self._thread = threading.Thread(target=self._fill, args=(tables, maker), daemon=True)
        self._thread.start()

    def _fill(self, tables: Iterator[pa.Table], maker: BatchMaker) -> None:
        """Runs in the thread; what goes wrong is raised where the batch is wanted."""
        try:
            for table in tables:
                samples = _samples(table)
                taken = Consumed(samples.epoch, samples.shard, samples.serial)
                if not self._offer((maker.make(samples), taken)):
                    return
            self._offer(None)
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.5)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> tuple[Batch, Consumed]:
        if self._ended:
            raise StopIteration
        before = time.perf_counter()
        item = self._ready.get()
        waited = time.perf_counter() - before
        if self._started:
            self.waited_s += waited
        else:
            self.start_s, self._started = waited, True
        if isinstance(item, tuple):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the thread; what it has made is dropped."""
        self._closed.set()
        self._thread.join(timeout=10)


def batches(
    shard: DataIterator, config: DataConfig, maker: BatchMaker, *, batch_size: int
) -> Batches:
    """This worker's share of the stream as batches.

    Args:
        shard: From `ray.train.get_dataset_shard`.
        config: Of the data.
        maker: What makes batches of samples.
        batch_size: Samples a batch on this worker; the last one may have fewer.
    """
    tables = shard.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=2)
    return Batches(iter(tables), maker, config.prefetch_batches)


def local_batches(
    manifest: Manifest, config: DataConfig, maker: BatchMaker, *, epochs: int, ledger: Ledger
) -> Batches:
    """The same samples in one process and without Ray, in the plan's own order."""
    units = plan(manifest, config, seed=maker.seed, epochs=epochs, ledger=ledger)
    reader = UnitReader(manifest, config, maker.seed)
    blocks = (block for unit in units for block in reader.read(unit))
    return Batches(_rebatched(blocks, config.batch_size), maker, config.prefetch_batches)


def _rebatched(blocks: Iterator[pa.Table], batch_size: int) -> Iterator[pa.Table]:
    """Blocks of any size as batches of one size, the last one excepted."""
    held: list[pa.Table] = []
    for block in blocks:
        held.append(block)
        while sum(len(table) for table in held) >= batch_size:
            whole = pa.concat_tables(held)
            yield whole.slice(0, batch_size)
            held = [whole.slice(batch_size)]
    left = pa.concat_tables(held) if held else None
    if left is not None and len(left):
        yield left


def _samples(table: pa.Table) -> Samples:
    """Arrow's columns as arrays."""
    items = table.column("items").combine_chunks()
    offsets = items.offsets.to_numpy().astype(np.int64)
    values = items.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    epoch, shard, serial = (
        table.column(name).to_numpy().astype(np.int64) for name in ("epoch", "shard", "serial")
    )
    return Samples(epoch, shard, serial, Ragged(values, offsets - offsets[0]))
