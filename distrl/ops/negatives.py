"""Random items that a user has never met, as the other candidates of a sampled ranking.

Dimensions: U users, K numbers or items a user.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from distrl.ops.held_out import HELD_BACK
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import below, mixed
from distrl.schema import Split

NUM_NEGATIVES = 99
"""A user's other candidates in the sampled protocol, beside the target."""

_NEGATIVES = 41
"""Purpose of draws, apart from those of `distrl.ops.sequences` and `distrl.ops.corruption`."""


@dataclass(frozen=True, slots=True)
class UnseenItems:
    """The items of a catalog that rows do not hold, counted without listing them."""

    known: Ragged
    """The different items of each row, rising."""
    num_items: int
    """V."""

    @classmethod
    def of(cls, lines: Ragged, num_items: int) -> "UnseenItems":
        """What each row leaves of items 1..num_items."""
        width = num_items + 1
        pairs = np.unique(lines.rows * width + lines.values)
        offsets = np.searchsorted(pairs, np.arange(len(lines.offsets)) * width)
        return cls(Ragged(pairs % width, offsets), num_items)

    @property
    def counts(self) -> Int64[np.ndarray, " U"]:
        """How many they are, a row."""
        return self.num_items - self.known.lengths

    def at(self, places: Int64[np.ndarray, "U K"]) -> Int64[np.ndarray, "U K"]:
        """The items at places 0..counts-1 of each row's unseen items, which rise."""
        # In front of a known item lie as many unseen ones as its id exceeds the known ones before
        # it; each known item with no more than `places` in front of it is passed.
        in_front = self.known.values - 1 - self.known.positions
        width = self.num_items + 1
        starts = np.arange(len(places))[:, None] * width
        passed = np.searchsorted(self.known.rows * width + in_front, starts + places, side="right")
        return 1 + places + passed - self.known.offsets[:-1, None]


def negative_keys(users: UInt64[np.ndarray, " U"], split: Split) -> UInt64[np.ndarray, " U"]:
    """The key of each user's draws for one split.

    Args:
        users: A hash of the seed and the user's id, which is the same in any batch and shard.
        split: Each has draws of its own.
    """
    return mixed(mixed(users, _NEGATIVES), HELD_BACK[split])


def random_unseen_items(
    unseen: UnseenItems, count: int, keys: UInt64[np.ndarray, " U"]
) -> Int64[np.ndarray, "U K"]:
    """`count` different unseen items a row, every set of them as likely.

    Args:
        unseen: What is drawn from.
        count: K.
        keys: One a row: the same key and row give the same items.

    Raises:
        ValueError: If a row has fewer unseen items than are asked for.
    """
    if len(keys) and unseen.counts.min() < count:
        raise ValueError(f"a row has {unseen.counts.min()} unseen items, fewer than {count}")
    return unseen.at(distinct_numbers(unseen.counts, count, keys))


def distinct_numbers(
    bounds: Int64[np.ndarray, " U"], count: int, keys: UInt64[np.ndarray, " U"]
) -> Int64[np.ndarray, "U K"]:
    """`count` different numbers of 0..bound-1 a row, every set as likely; bounds are >= count.

    Source: Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987): one draw a number, none of them
        repeated, so a row takes the same time in a small catalog as in a large one.
    """
    drawn = np.empty((len(keys), count), dtype=np.int64)
    for place in range(count):
        last = bounds - count + place
        number = below(mixed(keys, place), last + 1)
        is_taken = (drawn[:, :place] == number[:, None]).any(axis=1)
        drawn[:, place] = np.where(is_taken, last, number)
    return drawn
