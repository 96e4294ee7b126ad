"""What runs on Ray when a store is prepared: one function a kind of task.

A task returns first a small summary for the driver, then what other tasks take; that stays in
Ray's object store, which spills to disk, and never comes to the driver. Lists of references are
fetched one by one inside a task, where fetching all at once could exceed its memory.
"""

from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import ray
from ray import ObjectRef

from distrl.data.dense_ids import (
    Splitter,
    merge_counts,
    number_items,
    rare_items,
    sample,
    split_ranges,
)
from distrl.data.events import EventCleaner, ReadCounts
from distrl.data.id_hash import slot
from distrl.data.partitions import (
    Partition,
    assemble,
    item_buckets,
    item_counts,
    newest,
    sequences_table,
    shrink,
    split,
    split_by_user,
)
from distrl.data.planted_noise import with_noise
from distrl.data.source_files import ReadPart
from distrl.data.store_writer import write_items, write_sequences


class Size(NamedTuple):
    """How much is left in a partition."""

    users: int
    interactions: int
    longest: int
    """Interactions of the user who has most."""


class Span(NamedTuple):
    """Hashes of the first and last user of a partition, and how much is between."""

    first: int
    last: int
    interactions: int


def _size(partition: Partition) -> Size:
    longest = int(partition.lengths.max(initial=0))
    return Size(len(partition.users), partition.num_interactions, longest)


@ray.remote(num_returns="streaming")
def read_unit(
    cleaner: EventCleaner,
    num_partitions: int,
    seed: int,
    chunk_bytes: int,
    unit: Sequence[ReadPart],
) -> Generator[Any, None, None]:
    """Yields num_partitions tables for each chunk of events, and last the ReadCounts."""
    counts = ReadCounts()
    # Not `yield from`: Ray sends into generators, which a list cannot take.
    for chunk in _chunks(cleaner, unit, counts, chunk_bytes):
        for piece in split_by_user(chunk, num_partitions, seed):  # noqa: UP028
            yield piece
    yield counts


def _chunks(
    cleaner: EventCleaner, unit: Sequence[ReadPart], counts: ReadCounts, chunk_bytes: int
) -> Generator[pa.Table, None, None]:
    """Events by chunk_bytes or more; what is left over goes with the last, where there is one.

    Left over by itself it could be cut into pieces so small that the driver would hold them.
    """
    held: list[pa.Table] = []
    full: list[pa.Table] = []
    num_bytes = 0
    for part in unit:
        for table in cleaner.clean(part, counts):
            if table.num_rows:
                held.append(table)
                num_bytes += table.nbytes
            if num_bytes >= chunk_bytes:
                if full:
                    yield pa.concat_tables(full)
                full, held, num_bytes = held, [], 0
    if full or held:
        yield pa.concat_tables(full + held)


@ray.remote
def assemble_partition(
    pieces: Sequence[ObjectRef],
    keep: Literal["none", "first", "last"],
    most: int | None,
    seed: int,
    num_buckets: int,
) -> tuple[Any, ...]:
    """Size, partition, and its item counts by bucket."""
    partition = assemble([ray.get(piece) for piece in pieces], keep, seed)
    if most is not None:
        partition = newest(partition, most)
    return _size(partition), partition, *item_counts(partition, num_buckets)


@ray.remote
def find_rare(min_interactions: int, *counts: pa.Table) -> tuple[int, pa.Array]:
    """How many items of a bucket are too rare, and which."""
    rare = rare_items(counts, min_interactions)
    return len(rare), rare


@ray.remote
def shrink_partition(
    partition: Partition, removed: Sequence[ObjectRef], min_user_interactions: int
) -> tuple[Any, ...]:
    """Size, the smaller partition, and its item counts by bucket."""
    smaller = shrink(partition, map(ray.get, removed), len(removed), min_user_interactions)
    return _size(smaller), smaller, *item_counts(smaller, len(removed))


@ray.remote
def order_bucket(*counts: pa.Table) -> tuple[list[Splitter], pa.Table]:
    """A sample of a bucket's items, and all of them with their counts in order."""
    ordered = merge_counts(counts)
    return sample(ordered), ordered


@ray.remote
def split_bucket(ordered: pa.Table, splitters: Sequence[Splitter]) -> tuple[Any, ...]:
    """How many of a bucket's items fall into each range, and these items."""
    ranges = split_ranges(ordered, splitters)
    return [part.num_rows for part in ranges], *ranges


@ray.remote
def number_range(first_id: int, num_buckets: int, *parts: pa.Table) -> tuple[Any, ...]:
    """The number of items in a range, the range with dense ids, and the same by bucket."""
    numbered = number_items(parts, first_id)
    buckets = item_buckets(numbered.column("item"), num_buckets)
    return numbered.num_rows, numbered, *split(numbered, buckets, num_buckets)


@ray.remote
def join_tables(*tables: pa.Table) -> tuple[int, pa.Table]:
    """Rows, and the tables as one."""
    joined = pa.concat_tables(tables)
    return joined.num_rows, joined


@ray.remote
def make_sequences(
    noise_share: float,
    noise_seed: int,
    num_items: int,
    partition: Partition,
    id_tables: Sequence[ObjectRef],
) -> tuple[Span, pa.Table]:
    """Where the partition lies in the order of users, and one row a user with dense items."""
    span = Span(int(partition.hashes[0]), int(partition.hashes[-1]), partition.num_interactions)
    table = sequences_table(partition, map(ray.get, id_tables), len(id_tables))
    if noise_share > 0:
        table = with_noise(table, noise_share, num_items, noise_seed)
    return span, table


@ray.remote
def write_sequence_shard(
    store_uri: str,
    num_shards: int,
    row_group_rows: int,
    row_group_bytes: int,
    shard: int,
    tables: Sequence[ObjectRef],
) -> tuple[Any, None]:
    """The shard as written, or None where no user falls into it."""

    def of_shard() -> Generator[pa.Table, None, None]:
        for reference in tables:
            table = ray.get(reference)
            inside = slot(table.column("hash").to_numpy(), num_shards) == shard
            yield table.filter(pa.array(inside)).drop_columns("hash")

    written = write_sequences(
        store_uri,
        shard,
        of_shard(),
        row_group_rows=row_group_rows,
        row_group_bytes=row_group_bytes,
    )
    return written, None


@ray.remote
def write_item_part(
    store_uri: str, part: int, ranges: Sequence[tuple[ObjectRef, int, int]]
) -> tuple[Any, None]:
    """The part as written, from slices (reference, first row, rows) of the numbered ranges."""
    slices = [ray.get(reference).slice(first, rows) for reference, first, rows in ranges]
    return write_items(store_uri, part, pa.concat_tables(slices)), None
