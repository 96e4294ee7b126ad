"""Rows of a table of neighbors; `distrl.data.side_tables` says what is in its columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int64

from distrl.semantics.gathered import Load, gather


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
    shard: int,
    starts: Sequence[int],
    numbers: Int64[np.ndarray, "windows K"],
    load: Load,
    folder: Path,
) -> Iterator[Group]:
    """What is written of a shard, a row group of the sequences at a time.

    In memory are the shard and one other, as `load` gives them, and one row group with all of its
    pool. The neighbors of all row groups are gathered on disk, in one pass over the shards.

    Args:
        shard: Its number.
        starts: Number of the first window of each shard.
        numbers: Neighbors of each window of this one, -1 for none.
        load: Gives shards.
        folder: An empty one on this machine, until the last group is made.
    """
    pool, own = load(shard)
    dimension = pool.vectors.shape[1]
    gathered = gather(np.unique(numbers[numbers >= 0]), starts, dimension, load, folder)
    for low, high in zip(own.group_starts[:-1], own.group_starts[1:], strict=True):
        rows = np.arange(low, high)
        rows = rows[~own.held_out[rows]]
        found = numbers[rows] >= 0
        counts = found.sum(axis=1)
        pooled, places = np.unique(numbers[rows][found], return_inverse=True)
        taken = gathered.take(pooled)
        of_window = np.repeat(rows, counts)
        yield Group(
            pa.table(
                [
                    pa.array(own.rows[rows]),
                    pa.array(own.lengths[rows]),
                    _vectors(pool.vectors[rows]),
                    _lists(places, counts),
                ],
                schema=windows_schema(dimension),
            ),
            pa.table(
                [
                    pa.array(pooled),
                    pa.array(taken.users),
                    pa.array(taken.lengths),
                    _lists(taken.items, taken.shown),
                    _vectors(taken.vectors),
                ],
                schema=pool_schema(dimension),
            ),
            Counts(
                short=int((counts < numbers.shape[1]).sum()),
                alone=int((counts == 0).sum()),
                neighbors=int(counts.sum()),
                same_user=int((own.users[of_window] == taken.users[places]).sum()),
                held_out=int(taken.held_out[places].sum()),
            ),
        )


def _lists(values: np.ndarray, counts: Int64[np.ndarray, " rows"]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def _vectors(vectors: Float16[np.ndarray, "rows D"]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
