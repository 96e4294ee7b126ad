"""Windows: the prefixes of users' histories that texts, vectors and neighbors belong to."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from distrl.ops.ragged import Ragged
from distrl.schema import NUM_HELD_OUT

Which = Literal["every", "last"]


class Windows(NamedTuple):
    """Some prefixes of the rows of a shard, ascending by row and then by length."""

    row: Int64[np.ndarray, " windows"]
    """The row of the shard that each is a prefix of."""
    length: Int64[np.ndarray, " windows"]
    """Items of the prefix; a window shows the newest `max_len` of them."""


def windows_of(
    lengths: Int64[np.ndarray, " rows"], which: Which, *, held_out: bool = False
) -> Windows:
    """The windows of rows of so many items, held-out ones included.

    Args:
        lengths: Items of each row.
        which: `every` prefix that a training target follows, or only the `last` of each row.
        held_out: Add the inputs of validation and test too, which SRA-CL's code has among the
            neighbors that it trains on.
    """
    newest = lengths - NUM_HELD_OUT - 1
    oldest = np.ones_like(newest) if which == "every" else np.maximum(newest, 1)
    if held_out:
        newest = lengths - 1
    counts = np.maximum(newest - oldest + 1, 0)
    rows = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Windows(rows, oldest[rows] + within)


def window_items(sequences: Ragged, windows: Windows, max_len: int) -> Ragged:
    """The newest `max_len` items of each window, oldest first."""
    shown = np.minimum(windows.length, max_len)
    return sequences.pieces(sequences.offsets[windows.row] + windows.length - shown, shown)
