"""The correlated items of a store, on Ray; `distrl.ops.correlation` says what is computed.

    shards -> [count, in pieces by partition] -> [merge a partition] -> [rank, write] -> manifest

Items are cut into partitions. A counting task reads one shard a batch of users at a time and gives
its sums away whenever they have grown to `chunk_mb`; a partition's sums must fit into a task's
memory, and nothing else must. The driver holds references, one for each piece: as many as pieces
given away times partitions.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import ray
from annotated_types import Ge
from pydantic import PositiveInt
from ray import ObjectRef

from distrl import storage
from distrl.data.correlation_table import (
    CorrelationManifest,
    check_table_sizes,
    clear_table,
    find_table,
    write_manifest,
    write_part,
)
from distrl.data.histories import read_histories
from distrl.data.ray_stage import Stage, run_generators, run_tasks
from distrl.data.store import check_sizes, manifest_hash, one_place_for_all, read_manifest
from distrl.errors import ConfigError
from distrl.ops.correlation import (
    BYTES_PER_SUM,
    RunningSums,
    Sums,
    all_users,
    items_of,
    most_correlated,
    split,
    sums_of_users,
    users_of,
)
from distrl.ops.ragged import Ragged
from distrl.schema import NUM_HELD_OUT, Config, Manifest, Shard

_MB = 1 << 20
_SMALLEST_PARTITION_MB = 8
_MAX_PARTITIONS = 4096

logger = logging.getLogger(__name__)


class CorrelateConfig(Config):
    """Which items of a store go together."""

    store_uri: str
    """A folder that jobs/prepare.py wrote; the table becomes its folder `correlated`."""
    num_correlated: PositiveInt = 10
    """Most items listed for each."""
    window: Annotated[int, Ge(2)] = 50
    """Two different items of a user are a pair if they are less than so many apart; a longer
    history then costs its length times this, and not its square."""
    num_cpus: PositiveInt | None = None
    """Tasks of one CPU each that run at a time; None: as many as the cluster has CPUs."""
    chunk_mb: PositiveInt = 64
    """Sums that a counting task holds at most, in MB; it needs up to nine times this."""
    partition_mb: PositiveInt = 128
    """Sums of one partition of items, in MB, if every pair is met once; a task needs up to eight
    times this."""
    num_partitions: PositiveInt | None = None
    """Groups of items that are worked on at a time; None derives it from partition_mb. It changes
    memory and speed, never the result."""


def correlate(
    config: CorrelateConfig,
    *,
    overwrite: bool = False,
    connect: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = logger.info,
) -> CorrelationManifest:
    """Makes the table of a store's correlated items, or finds that it is already made.

    A table of another store that once lay in the place is replaced.

    Args:
        config: What to make of which store.
        overwrite: Replace a table made with other settings, or a torn one.
        connect: Connects to Ray, unless that is done; called when all that can be checked without
            Ray has been.
        say: Told of progress, a line at a time.

    Raises:
        ConfigError: If a table of the same store was made with other settings.
        SchemaError: If the store, or a table that is there, is torn.
        StorageError: If the store cannot be read or written.
    """
    manifest = read_manifest(config.store_uri)
    check_sizes(config.store_uri, manifest)
    if not overwrite:
        table = _finished(config, manifest)
        if table is not None:
            say(f"{config.store_uri} already has its correlated items: nothing to do")
            return table
    storage.check_writable(config.store_uri)
    connect()
    return _Correlation(config, manifest, say).run()


def _finished(config: CorrelateConfig, manifest: Manifest) -> CorrelationManifest | None:
    """The table that is there, if it is of this store."""
    table = find_table(config.store_uri)
    if table is None or table.store_hash != manifest_hash(manifest):
        return None
    for name in ("num_correlated", "window"):
        was, asked = getattr(table, name), getattr(config, name)
        if was != asked:
            raise ConfigError(
                f"{config.store_uri} already has correlated items made with {name}={was}, not "
                f"{asked}: --overwrite replaces them"
            )
    check_table_sizes(config.store_uri, table)
    return table


class _Correlation:
    """One run: the stages in order, each leaving references to the next."""

    def __init__(
        self, config: CorrelateConfig, manifest: Manifest, say: Callable[[str], None]
    ) -> None:
        self._config, self._manifest, self._say = config, manifest, say
        self._limit = config.num_cpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
        wanted = config.num_partitions or self._derived_partitions()
        self._num_partitions = min(wanted, manifest.num_items)

    def run(self) -> CorrelationManifest:
        """Runs all stages; a table that is there stays until its successor is counted."""
        config = self._config
        merged = self._merge(self._count())
        clear_table(config.store_uri)
        written = self._write(merged)
        table = CorrelationManifest(
            store_hash=manifest_hash(self._manifest),
            num_correlated=config.num_correlated,
            window=config.window,
            num_empty=sum(num_empty for _, num_empty in written),
            parts=tuple(part for part, _ in written),
        )
        with one_place_for_all(self._config.store_uri):
            check_table_sizes(self._config.store_uri, table)
        write_manifest(config.store_uri, table)
        return table

    def _derived_partitions(self) -> int:
        pairs = 2 * self._manifest.num_interactions * (self._config.window - 1)
        most = min(pairs, self._manifest.num_items**2) + self._manifest.num_items
        megabytes = most * BYTES_PER_SUM / _MB
        needed = math.ceil(megabytes / self._config.partition_mb)
        for_speed = min(2 * self._limit, math.ceil(megabytes / _SMALLEST_PARTITION_MB))
        return min(max(needed, for_speed, 1), _MAX_PARTITIONS)

    def _count(self) -> list[list[ObjectRef]]:
        """For each partition, references to its sums in pieces."""
        config, num = self._config, self._num_partitions
        most = config.chunk_mb * _MB // BYTES_PER_SUM
        count = partial(
            _count_shard.remote,
            config.store_uri,
            self._manifest.num_items,
            num,
            config.window,
            most,
        )
        shards = self._manifest.sequences
        with Stage("count pairs", len(shards), self._say) as stage:
            launches = [partial(count, shard) for shard in shards]
            finished = run_generators(launches, self._limit, stage, int)
        pieces: list[list[ObjectRef]] = [[] for _ in range(num)]
        for _, references in finished:
            for place, reference in enumerate(references):
                pieces[place % num].append(reference)
        return pieces

    def _merge(self, pieces: list[list[ObjectRef]]) -> list[list[ObjectRef]]:
        """For each partition, references to all its sums and to its users by item."""
        merge = partial(
            _merge_partition.options(num_returns=3).remote,
            self._manifest.num_items,
            self._num_partitions,
        )
        launches = [partial(merge, number, part) for number, part in enumerate(pieces)]
        with Stage("merge", len(launches), self._say) as stage:
            finished = run_tasks(launches, self._limit, stage, int)
        return [references for _, references in finished]

    def _write(self, merged: list[list[ObjectRef]]) -> list[tuple[Shard, int]]:
        """Each part as written, with how many of its items have no correlated one."""
        config = self._config
        users = [of_items for _, of_items in merged]
        write = partial(
            _write_partition.options(num_returns=2).remote,
            config.store_uri,
            self._manifest.num_items,
            config.num_correlated,
            users,
        )
        launches = [partial(write, number, sums) for number, (sums, _) in enumerate(merged)]
        with Stage("rank and write", len(launches), self._say) as stage:
            finished = run_tasks(launches, self._limit, stage, lambda written: written[0].rows)
        return [written for written, _ in finished]


def training_parts(store_uri: str, shard: Shard, num_items: int) -> Generator[Ragged, None, None]:
    """All but what is held out of a shard's sequences, some users at a time.

    Raises:
        SchemaError: If the shard is not what the manifest says.
        StorageError: If it cannot be read.
    """
    for _, whole in read_histories(store_uri, shard, num_items):
        kept = np.maximum(whole.lengths - NUM_HELD_OUT, 0)
        yield whole.pieces(whole.offsets[:-1], kept)


def counted(
    batches: Iterator[Ragged], num_items: int, num_partitions: int, window: int, most: int
) -> Generator[list[Sums], None, None]:
    """Sums of batches of users.

    Yields:
        One `Sums` for each partition, whenever `most` sums are held, and at the end.
    """
    base, held = num_items + 1, RunningSums()
    for histories in batches:
        for block in sums_of_users(histories, window, base):
            held.add(block)
            if len(held) >= most:
                yield split(held.whole(), num_partitions, base)
                held = RunningSums()
    yield split(held.whole(), num_partitions, base)


@ray.remote(num_returns="streaming")
def _count_shard(
    store_uri: str, num_items: int, num_partitions: int, window: int, most: int, shard: Shard
) -> Generator[Any, None, None]:
    """Yields num_partitions pieces for each chunk of sums, and last the users that were read."""
    batches = training_parts(store_uri, shard, num_items)
    for pieces in counted(batches, num_items, num_partitions, window, most):
        # Not `yield from`: Ray sends into generators, which a list cannot take.
        for piece in pieces:  # noqa: UP028
            yield piece
    yield shard.rows


@ray.remote
def _merge_partition(
    num_items: int, num_partitions: int, partition: int, pieces: Sequence[ObjectRef]
) -> tuple[int, Sums, np.ndarray]:
    """How many sums a partition has, these, and its users by item."""
    held = RunningSums()
    for piece in pieces:
        held.add(ray.get(piece))
    whole, items = held.whole(), items_of(partition, num_partitions, num_items)
    return len(whole), whole, users_of(whole, items, num_items + 1)


@ray.remote
def _write_partition(
    store_uri: str,
    num_items: int,
    num_correlated: int,
    users: Sequence[ObjectRef],
    partition: int,
    sums: Sums,
) -> tuple[tuple[Shard, int], None]:
    """The part as written, and how many of its items have no correlated one."""
    items = items_of(partition, len(users), num_items)
    of_items = all_users([ray.get(part) for part in users], num_items)
    correlated = most_correlated(sums, items, of_items, num_correlated)
    part = write_part(store_uri, partition, items, correlated)
    return (part, int((correlated.lengths == 0).sum())), None
