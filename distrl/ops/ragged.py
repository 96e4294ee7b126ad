"""Sequences of any length without padding, and without a Python loop over them.

A ragged array is `values` plus `offsets`: row r is values[offsets[r] : offsets[r + 1]].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int64


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of item ids of any length, zero included, oldest first."""

    values: Int64[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " rows1"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """Rows given one by one."""
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, offsets[-1]), offsets)

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Items of each row."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> Int64[np.ndarray, " tokens"]:
        """Row of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    @property
    def positions(self) -> Int64[np.ndarray, " tokens"]:
        """Place of each value within its row, 0 for the oldest."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def keep(self, kept: Bool[np.ndarray, " tokens"]) -> "Ragged":
        """The same rows with some of their values."""
        before = np.concatenate([[0], np.cumsum(kept)])
        return Ragged(self.values[kept], before[self.offsets])

    def newest(self, count: int) -> "Ragged":
        """The last `count` items of each row."""
        from_end = np.repeat(self.offsets[1:], self.lengths) - np.arange(len(self.values))
        return self.keep(from_end <= count)

    def take(self, rows: Int64[np.ndarray, " taken"]) -> "Ragged":
        """Some of the rows, in the order asked for."""
        return self.pieces(self.offsets[:-1][rows], self.lengths[rows])

    def pieces(
        self, starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"]
    ) -> "Ragged":
        """Pieces of the values as rows; they may overlap.

        Args:
            starts: Index into `values` of the first value of each piece.
            lengths: Values of each piece.
        """
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Ragged(
            self.values[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)], offsets
        )


def appended(rows: Ragged, values: Int64[np.ndarray, " rows"]) -> Ragged:
    """Each row with one more value behind it."""
    ends = rows.offsets[1:]
    return Ragged(np.insert(rows.values, ends, values), rows.offsets + np.arange(len(rows.offsets)))
