"""From the plan to batches on a worker: one long Ray Data pass over all epochs.

Ray Data has no resumable iterator (ray#37633, ray#48224). Its dataset is therefore built anew at
each start of the workers, from the plan of what the ledger does not hold yet.
"""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from jaxtyping import Int64
from ray.data import DataIterator, ExecutionOptions, ExecutionResources, TaskPoolStrategy
from ray.exceptions import RayTaskError

from distrl.contract import Batch
from distrl.data.config import DataConfig
from distrl.data.found import Found
from distrl.data.plan import Ledger, plan
from distrl.data.ragged_columns import to_ragged
from distrl.data.samples import BatchMaker, Samples
from distrl.data.side_tables import SideManifest
from distrl.data.units import UnitReader, unit_row
from distrl.errors import DistrlError
from distrl.schema import Manifest

MAX_READ_TASKS = 2000
"""Reading tasks of a pass: Ray holds an object for each from the start. Longer plans give several
consecutive units to a task."""

BLOCK_BATCHES = 4
"""Batches' worth of samples in a block, the unit in which samples are dealt to workers."""

_SAMPLE_BYTES = 32
"""Of a sample in a block, besides its items."""

_NEIGHBOR_BYTES = 24
"""Of a neighbor in a block, besides its items and its vector."""


@dataclass(frozen=True, slots=True)
class Consumed:
    """Places in the plan of the samples of one batch."""

    epoch: Int64[np.ndarray, " n"]
    shard: Int64[np.ndarray, " n"]
    serial: Int64[np.ndarray, " n"]


def training_dataset(
    manifest: Manifest,
    config: DataConfig,
    *,
    seed: int,
    epochs: int,
    ledger: Ledger,
    neighbors: SideManifest | None = None,
) -> ray.data.Dataset:
    """Everything that is still to train on, as one dataset of samples.

    Args:
        manifest: Of the store.
        config: How to read it.
        seed: Fixes the order of units, and of samples in each.
        epochs: Passes over the store, those already made included.
        ledger: What is trained on already.
        neighbors: Of the table of neighbors that samples are to bring, if any.

    Raises:
        CheckpointError: If the ledger holds samples that the store does not have.
    """
    units = [unit_row(u) for u in plan(manifest, config, seed=seed, epochs=epochs, ledger=ledger)]
    dataset = ray.data.from_items(units, override_num_blocks=min(len(units), MAX_READ_TASKS) or 1)
    context = dataset.context
    # Ray merges what a task yields into blocks of this size, by default 128 MiB: all of an epoch.
    context.target_max_block_size = _block_bytes(manifest, config, neighbors)
    context.enable_progress_bars = False
    return dataset.map_batches(
        UnitReader(manifest, config, seed, neighbors).read_rows,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=TaskPoolStrategy(size=config.read_tasks),
        num_cpus=config.read_cpus,
    )


def _block_bytes(
    manifest: Manifest, config: DataConfig, neighbors: SideManifest | None = None
) -> int:
    """Bytes of BLOCK_BATCHES batches' worth of samples, about."""
    items = manifest.num_interactions / manifest.num_users
    if config.samples == "prefix" or config.long_sequences == "last":
        items = min(items, config.max_len + 1)
    sample = _SAMPLE_BYTES + 4 * items
    if neighbors is not None:
        shown = 2 * neighbors.dimension + 4 * min(items, config.max_len) + _NEIGHBOR_BYTES
        prefixes = config.contrasted_prefixes if config.samples == "all_positions" else 1
        sample += prefixes * (2 * neighbors.dimension + config.num_neighbors * shown)
    return int(BLOCK_BATCHES * config.batch_size * sample)


class StreamSplit(ray.train.DataConfig):
    """Deals blocks to workers as they come, and drops none.

    Ray's own split is equal: it drops rows at the end so that ranks take as many steps. Here all
    rows are served, and the loop keeps ranks in step by an empty batch for those that have run out.
    """

    def __init__(self, read_ahead_bytes: int) -> None:
        limits = ExecutionResources.for_limits(object_store_memory=read_ahead_bytes)
        super().__init__(execution_options=ExecutionOptions(resource_limits=limits))

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[dict[str, DataIterator]]:
        """The part of each dataset that each worker reads; Ray calls it at every start of them."""
        shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset.context.execution_options = self._resolve_execution_options(name)
            parts = dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for shard, part in zip(shards, parts, strict=True):
                shard[name] = part
        return shards


class Batches(Iterator[tuple[Batch, Consumed]]):
    """Batches made in a thread beside training, a few ahead; counts the seconds of waiting.

    The thread ends with the batches, with `close`, or when nobody holds this iterator any more.
    """

    def __init__(self, tables: Iterator[pa.Table], maker: BatchMaker, prefetch: int) -> None:
        self.start_s = 0.0
        """Seconds until the first batch, which no prefetch can hide."""
        self.waited_s = 0.0
        """Seconds that `next` has waited for the batches after it."""
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._started = self._ended = False
        closed = threading.Event()
        self.close = weakref.finalize(self, closed.set)
        """Ends the thread; what it has made is dropped."""
        threading.Thread(
            target=_fill, args=(tables, maker, self._ready, closed), name="batches", daemon=True
        ).start()

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
        raise StopIteration if item is None else item


def _fill(
    tables: Iterator[pa.Table],
    maker: BatchMaker,
    ready: queue.Queue[Any],
    closed: threading.Event,
) -> None:
    """Runs in the thread; what goes wrong is raised where the batch is wanted."""

    def offer(item: object) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    try:
        for table in tables:
            samples = _samples(table, maker)
            taken = Consumed(samples.epoch, samples.shard, samples.serial)
            if not offer((maker.make(samples), taken)):
                return
        offer(None)
    except BaseException as error:
        offer(_ours(error))


def _ours(error: BaseException) -> BaseException:
    """The user's mistake inside what Ray raised for its reading task, or what was raised."""
    inner: BaseException | None = error
    while inner is not None and type(inner).__module__ != DistrlError.__module__:
        inner = inner.cause if isinstance(inner, RayTaskError) else inner.__cause__
    if inner is None:
        return error
    said, added, _ = str(inner).partition("\nFailed to apply UDF")
    # Ray Data appends what its own retries did, and how to change them.
    return type(inner)(said) if added else inner


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
    """The same samples in one process and without Ray, in the plan's own order.

    Raises:
        CheckpointError: If the ledger holds samples that the store does not have.
    """
    units = plan(manifest, config, seed=maker.seed, epochs=epochs, ledger=ledger)
    reader = UnitReader(manifest, config, maker.seed, maker.neighbors)
    blocks = (block for unit in units for block in reader.read(unit))
    return Batches(_rebatched(blocks, config.batch_size), maker, config.prefetch_batches)


def _rebatched(blocks: Iterator[pa.Table], batch_size: int) -> Iterator[pa.Table]:
    """Blocks of any size as batches of one size, the last one excepted."""
    held: list[pa.Table] = []
    for block in blocks:
        whole = pa.concat_tables([*held, block])
        while len(whole) >= batch_size:
            yield whole.slice(0, batch_size)
            whole = whole.slice(batch_size)
        held = [whole]
    yield from (left for left in held if len(left))


def _samples(table: pa.Table, maker: BatchMaker) -> Samples:
    """Arrow's columns as arrays."""
    epoch, shard, serial = (
        table.column(name).to_numpy().astype(np.int64) for name in ("epoch", "shard", "serial")
    )
    items = to_ragged(table.column("items"))
    if maker.neighbors is None:
        return Samples(epoch, shard, serial, items)
    return Samples(epoch, shard, serial, items, Found.of_table(table, maker.neighbors.dimension))
