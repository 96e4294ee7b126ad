"""Windows of any shards, gathered on this machine's disk in one pass over all shards.

The neighbors of a row group lie in nearly every shard, so that fetching them row group by row group
fetches all shards again and again. What any row group of a shard needs is therefore gathered first,
and each takes its own from there. The files hold every window once, uncompressed: about what the
part of the pool takes that is made of them. They are read through the page cache, which the system
takes back when memory is short.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Int32, Int64

from distrl.semantics.embedded import WindowShard
from distrl.semantics.nearest import Pool

Load = Callable[[int], tuple[Pool, WindowShard]]
"""Gives the vectors and the windows of a shard."""

_ROWS_AT_ONCE = 1 << 15


class Taken(NamedTuple):
    """Windows of any shards, in memory."""

    users: Int64[np.ndarray, " taken"]
    lengths: Int32[np.ndarray, " taken"]
    held_out: Bool[np.ndarray, " taken"]
    shown: Int64[np.ndarray, " taken"]
    """Items that each shows."""
    items: Int32[np.ndarray, " tokens"]
    vectors: Float16[np.ndarray, "taken D"]


class Gathered(NamedTuple):
    """Windows of any shards by ascending numbers; items and vectors are in files."""

    numbers: Int64[np.ndarray, " gathered"]
    users: Int64[np.ndarray, " gathered"]
    lengths: Int32[np.ndarray, " gathered"]
    held_out: Bool[np.ndarray, " gathered"]
    offsets: Int64[np.ndarray, " gathered1"]
    items: Int32[np.ndarray, " tokens"]
    vectors: Float16[np.ndarray, "gathered D"]

    def take(self, numbers: Int64[np.ndarray, " taken"]) -> Taken:
        """Copies of some of them, each of which must be there."""
        at = np.searchsorted(self.numbers, numbers)
        places, shown = _pieces(self.offsets, at)
        return Taken(
            self.users[at],
            self.lengths[at],
            self.held_out[at],
            shown,
            np.asarray(self.items[places]),
            np.asarray(self.vectors[at]),
        )


def gather(
    numbers: Int64[np.ndarray, " gathered"],
    starts: Sequence[int],
    dimension: int,
    load: Load,
    folder: Path,
) -> Gathered:
    """Windows of ascending numbers, wherever they are.

    In memory are the vectors of one shard as `load` gives them, and for each window some 30 bytes.

    Args:
        numbers: Of the windows.
        starts: Number of the first window of each shard.
        dimension: Of their vectors, D.
        load: Gives shards; asked for each that has such a window, once.
        folder: For two files, which must outlive what is returned.
    """
    bounds = [*np.searchsorted(numbers, np.asarray(starts)).tolist(), len(numbers)]
    known = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, bool))]
    shown = [np.zeros(1, np.int64)]
    with (folder / "vectors").open("wb") as vectors, (folder / "items").open("wb") as items:
        for shard, (low, high) in enumerate(pairwise(bounds)):
            if low == high:
                continue
            rows = numbers[low:high] - starts[shard]
            pool, windows = load(shard)
            known.append((windows.users[rows], windows.lengths[rows], windows.held_out[rows]))
            shown.append(_append(pool, windows, rows, vectors, items))
    users, lengths, held_out = map(np.concatenate, zip(*known, strict=True))
    return Gathered(
        numbers,
        users,
        lengths,
        held_out,
        np.cumsum(np.concatenate(shown)),
        _mapped(folder / "items", np.int32),
        _mapped(folder / "vectors", np.float16).reshape(-1, dimension),
    )


def _append(
    pool: Pool, windows: WindowShard, rows: np.ndarray, vectors: IO[bytes], items: IO[bytes]
) -> Int64[np.ndarray, " rows"]:
    """Writes vectors and items of some rows of a shard; how many items each shows."""
    counts = []
    for low in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[low : low + _ROWS_AT_ONCE]
        places, shown = _pieces(windows.offsets, some)
        pool.vectors[some].tofile(vectors)
        windows.items[places].astype(np.int32, copy=False).tofile(items)
        counts.append(shown)
    return np.concatenate(counts)


def _pieces(
    offsets: Int64[np.ndarray, " rows1"], rows: Int64[np.ndarray, " taken"]
) -> tuple[Int64[np.ndarray, " tokens"], Int64[np.ndarray, " taken"]]:
    """Where the values of some rows lie, and how many each has."""
    begins, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(begins - before, counts), counts


def _mapped(path: Path, dtype: type) -> np.ndarray:
    # Nothing cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
