"""Rows of a table of neighbors; `distrl.data.side_tables` says what is in its columns."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float16, Int32, Int64

from distrl.semantics.embedded import WindowShard
from distrl.semantics.nearest import Pool

Load = Callable[[int], tuple[Pool, WindowShard]]
"""Gives the vectors and the windows of a shard."""


class Counts(NamedTuple):
    """What was counted of some windows that neighbors were sought for."""

    short: int
    """Windows with fewer neighbors than were asked for."""
    alone: int
    """Windows without any."""
    neighbors: int
    """Of all of them."""
    same_user: int
    """Neighbors that are windows of the same user."""
    held_out: int
    """Neighbors that are inputs of validation or test."""


def total(counts: Sequence[Counts]) -> Counts:
    """Of all together."""
    short, alone, neighbors, same_user, held_out = (
        sum(column) for column in zip(Counts(0, 0, 0, 0, 0), *counts, strict=True)
    )
    return Counts(short, alone, neighbors, same_user, held_out)


class Group(NamedTuple):
    """What is written for the users of one row group."""

    windows: pa.Table
    pool: pa.Table
    counts: Counts


class Taken(NamedTuple):
    """Windows of any shards, by their numbers."""

    users: Int64[np.ndarray, " taken"]
    lengths: Int32[np.ndarray, " taken"]
    held_out: Bool[np.ndarray, " taken"]
    vectors: Float16[np.ndarray, "taken D"]
    items: pa.Array


def items_schema() -> pa.Schema:
    """Of the items' parts."""
    return pa.schema({"item_id": pa.int32(), "neighbors": pa.list_(pa.int32())})


def windows_schema(dimension: int) -> pa.Schema:
    """Of the windows' parts."""
    return pa.schema(
        {
            "row": pa.int32(),
            "length": pa.int32(),
            "vector": pa.list_(pa.float16(), dimension),
            "neighbors": pa.list_(pa.int32()),
        }
    )


def pool_schema(dimension: int) -> pa.Schema:
    """Of the pools' parts."""
    return pa.schema(
        {
            "window": pa.int64(),
            "user": pa.int64(),
            "length": pa.int32(),
            "items": pa.list_(pa.int32()),
            "vector": pa.list_(pa.float16(), dimension),
        }
    )


def items_table(
    items: Int64[np.ndarray, " items"], numbers: Int64[np.ndarray, "items K"]
) -> pa.Table:
    """Items and the ids of their neighbors, -1 for none."""
    found = numbers >= 0
    lists = _lists(numbers[found], found.sum(axis=1))
    return pa.table([pa.array(items.astype(np.int32)), lists], schema=items_schema())


def groups(
    shard: int, starts: Sequence[int], numbers: Int64[np.ndarray, "windows K"], load: Load
) -> Iterator[Group]:
    """What is written of a shard, a row group of the sequences at a time.

    Args:
        shard: Its number.
        starts: Number of the first window of each shard.
        numbers: Neighbors of each window of this one, -1 for none.
        load: Gives shards.
    """
    pool, own = load(shard)
    for low, high in zip(own.group_starts[:-1], own.group_starts[1:], strict=True):
        rows = np.arange(low, high)
        rows = rows[~own.held_out[rows]]
        found = numbers[rows] >= 0
        counts = found.sum(axis=1)
        pooled, places = np.unique(numbers[rows][found], return_inverse=True)
        taken = take(pooled, starts, load)
        of_window = np.repeat(rows, counts)
        yield Group(
            pa.table(
                [
                    pa.array(own.rows[rows]),
                    pa.array(own.lengths[rows]),
                    _vectors(pool.vectors[rows]),
                    _lists(places, counts),
                ],
                schema=windows_schema(pool.vectors.shape[1]),
            ),
            pa.table(
                [
                    pa.array(pooled),
                    pa.array(taken.users),
                    pa.array(taken.lengths),
                    taken.items,
                    _vectors(taken.vectors),
                ],
                schema=pool_schema(pool.vectors.shape[1]),
            ),
            Counts(
                short=int((counts < numbers.shape[1]).sum()),
                alone=int((counts == 0).sum()),
                neighbors=int(counts.sum()),
                same_user=int((own.users[of_window] == taken.users[places]).sum()),
                held_out=int(taken.held_out[places].sum()),
            ),
        )


def take(numbers: Int64[np.ndarray, " taken"], starts: Sequence[int], load: Load) -> Taken:
    """Windows of ascending numbers, wherever they are; a shard in memory at a time."""
    shards = np.searchsorted(np.asarray(starts), numbers, side="right") - 1
    pieces = []
    for shard in np.unique(shards).tolist() or [0]:
        rows = numbers[shards == shard] - starts[shard]
        pool, windows = load(shard)
        begins, ends = windows.offsets[rows], windows.offsets[rows + 1]
        counts = ends - begins
        before = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(begins - before, counts)
        pieces.append(
            (
                windows.users[rows],
                windows.lengths[rows],
                windows.held_out[rows],
                pool.vectors[rows],
                _lists(windows.items[places], counts),
            )
        )
    users, lengths, held_out, vectors, items = zip(*pieces, strict=True)
    return Taken(
        np.concatenate(users),
        np.concatenate(lengths),
        np.concatenate(held_out),
        np.concatenate(vectors),
        pa.concat_arrays(items),
    )


def _lists(values: np.ndarray, counts: Int64[np.ndarray, " rows"]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def _vectors(vectors: Float16[np.ndarray, "rows D"]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
