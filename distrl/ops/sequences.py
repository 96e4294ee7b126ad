"""Random views of ragged sequences, drawn by counter, so that they depend on nothing else.

A draw is a hash of a row's key, a purpose and a place: the same in any batch, on any worker, after
any restart. Nothing here loops over sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64, UInt64

from distrl.ops.ragged import Ragged

Operation = Literal["crop", "mask", "reorder"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDING = 1e-9
"""Added before a floor, so that 0.8 * 5 is 4 and not 3."""

_CHOOSE, _START, _ORDER = 1, 3, 5
"""Purposes of draws; a view adds its number, 0 or 1."""


def mixed(
    keys: UInt64[np.ndarray, " n"], word: int | Int64[np.ndarray, " n"] | UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """New keys from old ones and another word: splitmix64's finalizer, vectorized."""
    with np.errstate(over="ignore"):
        z = keys + (np.asarray(word).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))


def uniform(keys: UInt64[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Numbers in [0, 1) with 53 random bits."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_keys(
    seed: int,
    epoch: Int64[np.ndarray, " n"],
    shard: Int64[np.ndarray, " n"],
    serial: Int64[np.ndarray, " n"],
) -> UInt64[np.ndarray, " n"]:
    """The key of each sample of a run: its place in the plan, nothing else."""
    start = np.full(len(serial), seed, dtype=np.uint64)
    return mixed(mixed(mixed(start, epoch), shard), serial)


def share_of(lengths: Int64[np.ndarray, " n"], ratio: float) -> Int64[np.ndarray, " n"]:
    """floor(ratio * length), exact for ratios such as 0.8 that floats cannot hold."""
    return np.floor(ratio * lengths + _ROUNDING).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Views:
    """How views are drawn; see `distrl.data.config.AugmentConfig`."""

    operations: Sequence[Operation]
    crop_ratio: float
    mask_ratio: float
    reorder_ratio: float
    distinct: bool
    mask_id: int

    def draw(self, sequences: Ragged, keys: UInt64[np.ndarray, " rows"]) -> tuple[Ragged, Ragged]:
        """Two views of each sequence, each by one operation applied to the original.

        Source: MCLRec's code: sequences of length 1 stay as they are in both views; longer ones get
            two different operations, each ordered pair as likely as any other.

        Args:
            sequences: Rows of at least one item.
            keys: One a row.

        Returns:
            Two ragged arrays with the rows of `sequences`.
        """
        count = len(self.operations)
        first = (uniform(mixed(keys, _CHOOSE)) * count).astype(np.int64)
        draw = uniform(mixed(keys, _CHOOSE + 1))
        if self.distinct:
            second = (first + 1 + (draw * (count - 1)).astype(np.int64)) % count
        else:
            second = (draw * count).astype(np.int64)
        return self._view(sequences, keys, first, 0), self._view(sequences, keys, second, 1)

    def _view(self, sequences: Ragged, keys: np.ndarray, choice: np.ndarray, number: int) -> Ragged:
        """One view: its operation's outcome in each row, from a single sort of all tokens."""
        lengths, rows = sequences.lengths, sequences.rows
        name = np.asarray(self.operations)[choice]
        name[lengths == 1] = "keep"
        position = np.arange(len(rows)) - np.repeat(sequences.offsets[:-1], lengths)

        width = np.where(name == "reorder", share_of(lengths, self.reorder_ratio), 0)
        kept = np.maximum(share_of(lengths, 1.0 - self.crop_ratio), 1)
        width = np.where(name == "crop", kept, width)
        start = (uniform(mixed(keys, _START + number)) * (lengths - width + 1)).astype(np.int64)
        after = position - start[rows]
        inside = (after >= 0) & (after < width[rows])

        draws = uniform(mixed(mixed(keys, _ORDER + number)[rows], position))
        is_mask = (name == "mask")[rows]
        is_reorder = (name == "reorder")[rows] & inside
        place = np.where(is_mask, draws, position.astype(np.float64))
        place = np.where(is_reorder, start[rows] + draws * width[rows], place)
        order = np.lexsort((place, rows))

        values = np.where((name == "reorder")[rows], sequences.values[order], sequences.values)
        # Sorting puts the tokens of a masked row in a random order; its first ones are hidden.
        hidden = is_mask & (position < share_of(lengths, self.mask_ratio)[rows])
        values[order[hidden]] = self.mask_id
        view = Ragged(values, sequences.offsets)
        return view.keep(inside | (name != "crop")[rows])
