"""Random views of ragged sequences, drawn by counter, so that they depend on nothing else.

A draw is a hash of a row's key, a purpose and a place: the same in any batch, on any worker, after
any restart. Nothing here loops over sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64

from distrl.ops.ragged import Ragged

Operation = Literal["crop", "mask", "reorder", "substitute"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WORD = 1 << 64
_ROUNDING = 1e-9
"""Added before a floor, so that (1 - 0.9) * 10 is 1 and not 0."""

_FIRST_OPERATION, _SECOND_OPERATION, _VIEW, _START, _ORDER, _OTHER = range(6)
"""Purposes of draws: what is drawn for one says nothing of another."""


def mixed(
    keys: UInt64[np.ndarray, " n"], word: int | Int64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """New keys from old ones and another word: splitmix64, vectorized."""
    words = np.asarray(word).astype(np.uint64)
    with np.errstate(over="ignore"):
        z = keys + (words + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))


def below(
    keys: UInt64[np.ndarray, " n"], bound: int | Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """A number in 0..bound-1 for each key, each as likely to 1 in 2^32; bounds are below 2^32."""
    high = keys >> np.uint64(32)
    return ((high * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def seed_key(seed: int) -> UInt64[np.ndarray, " 1"]:
    """The key that all others of a run come from."""
    return np.array([seed % _WORD], dtype=np.uint64)


def permutation(size: int, key: UInt64[np.ndarray, " 1"]) -> Int64[np.ndarray, " size"]:
    """0..size-1 in an order that the key fixes, with any version of numpy."""
    return np.argsort(mixed(np.repeat(key, size), np.arange(size)), kind="stable")


def sample_keys(
    seed: int,
    epoch: Int64[np.ndarray, " n"],
    shard: Int64[np.ndarray, " n"],
    serial: Int64[np.ndarray, " n"],
) -> UInt64[np.ndarray, " n"]:
    """The key of each sample of a run: its place in the plan, nothing else."""
    return mixed(mixed(mixed(np.repeat(seed_key(seed), len(serial)), epoch), shard), serial)


def share_of(lengths: Int64[np.ndarray, " n"], ratio: float) -> Int64[np.ndarray, " n"]:
    """floor(ratio * length), exact for ratios such as 1 - 0.9 that floats cannot hold."""
    return np.floor(ratio * lengths + _ROUNDING).astype(np.int64)


def chosen(
    sequences: Ragged, counts: Int64[np.ndarray, " rows"], keys: UInt64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " chosen"]:
    """Indices of values: `counts` different ones of each row, every choice as likely."""
    where = np.flatnonzero((counts > 0)[sequences.rows])
    rows = sequences.rows[where]
    order = _shuffled(sequences, where, keys)
    return order[sequences.positions[where] < counts[rows]]


def _shuffled(
    sequences: Ragged, where: Int64[np.ndarray, " some"], keys: UInt64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " some"]:
    """Rising indices of values, shuffled within each row."""
    rows = sequences.rows[where]
    draws = mixed(keys[rows], sequences.positions[where])
    return where[np.lexsort((draws, rows))]


def crop(
    sequences: Ragged, kept: Int64[np.ndarray, " rows"], keys: UInt64[np.ndarray, " rows"]
) -> Ragged:
    """`kept` consecutive items of each row, from a uniformly drawn start."""
    start = below(mixed(keys, _START), sequences.lengths - kept + 1)
    return sequences.pieces(sequences.offsets[:-1] + start, kept)


def mask(
    sequences: Ragged,
    hidden: Int64[np.ndarray, " rows"],
    keys: UInt64[np.ndarray, " rows"],
    mask_id: int,
) -> Ragged:
    """Each row with `hidden` different items, uniformly drawn, replaced by `mask_id`."""
    values = sequences.values.copy()
    values[chosen(sequences, hidden, mixed(keys, _ORDER))] = mask_id
    return Ragged(values, sequences.offsets)


def reorder(
    sequences: Ragged, width: Int64[np.ndarray, " rows"], keys: UInt64[np.ndarray, " rows"]
) -> Ragged:
    """Each row with `width` consecutive items, from a uniformly drawn start, shuffled in place."""
    start = below(mixed(keys, _START), sequences.lengths - width + 1)
    after = sequences.positions - start[sequences.rows]
    window = np.flatnonzero((after >= 0) & (after < width[sequences.rows]))
    values = sequences.values.copy()
    values[window] = sequences.values[_shuffled(sequences, window, mixed(keys, _ORDER))]
    return Ragged(values, sequences.offsets)


def substitute(
    sequences: Ragged,
    replaced: Int64[np.ndarray, " rows"],
    keys: UInt64[np.ndarray, " rows"],
    correlated: Ragged,
    among: int,
) -> Ragged:
    """Each row with `replaced` different items, uniformly drawn, become correlated ones.

    Args:
        sequences: Rows of items.
        replaced: Items to replace of each row; those that have no correlated one stay.
        keys: One a row.
        correlated: Row i is of item i, best first; row 0 is of none.
        among: An item becomes one of the first so many of its row, each as likely.
    """
    at = chosen(sequences, replaced, mixed(keys, _ORDER))
    choices = np.minimum(correlated.lengths[sequences.values[at]], among)
    at, choices = at[choices > 0], choices[choices > 0]
    draws = mixed(mixed(keys, _OTHER)[sequences.rows[at]], sequences.positions[at])
    values = sequences.values.copy()
    values[at] = correlated.values[correlated.offsets[values[at]] + below(draws, choices)]
    return Ragged(values, sequences.offsets)


@dataclass(frozen=True, slots=True)
class Views:
    """How views are drawn.

    Source: MCLRec's code. Of L items crop keeps max(1, floor((1 - crop_ratio) L)), mask hides
        floor(mask_ratio L), reorder shuffles floor(reorder_ratio L). CoSeRec's code
        (arXiv:2108.06479) for substitute, which replaces max(1, floor(substitute_ratio L)).
    """

    operations: Sequence[Operation]
    """Each view is the outcome of one of them, applied to the original sequence."""
    crop_ratio: float
    mask_ratio: float
    reorder_ratio: float
    distinct: bool
    """Two different operations a pair, each ordered pair as likely; or any two, as in CL4SRec."""
    mask_id: int
    """What a hidden item becomes."""
    substitute_ratio: float = 0.0
    substitute_among: int = 1
    """Best of an item's correlated ones that it may become."""
    correlated: Ragged | None = None
    """For each item, row 0 being of none, the ones that may stand for it, best first; needed by
    substitute."""

    def __post_init__(self) -> None:
        if "substitute" in self.operations and self.correlated is None:
            raise ValueError("views that substitute need the table of correlated items")

    def draw(self, sequences: Ragged, keys: UInt64[np.ndarray, " rows"]) -> tuple[Ragged, Ragged]:
        """Two views of each sequence; those of a single item stay as they are in both.

        Args:
            sequences: Rows of at least one item.
            keys: One a row.

        Returns:
            Two ragged arrays with the rows of `sequences`.
        """
        first, second = self._operations(keys)
        num_rows = len(keys)
        pair = Ragged(
            np.tile(sequences.values, 2),
            np.concatenate([sequences.offsets, sequences.offsets[1:] + sequences.offsets[-1]]),
        )
        pair_keys = np.concatenate([mixed(keys, _VIEW), mixed(mixed(keys, _VIEW), 1)])
        views = self._applied(pair, np.concatenate([first, second]), pair_keys)
        middle = views.offsets[num_rows]
        return (
            Ragged(views.values[:middle], views.offsets[: num_rows + 1]),
            Ragged(views.values[middle:], views.offsets[num_rows:] - middle),
        )

    def _operations(
        self, keys: UInt64[np.ndarray, " rows"]
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Indices into `operations` for both views of each row."""
        count = len(self.operations)
        first = below(mixed(keys, _FIRST_OPERATION), count)
        if not self.distinct:
            return first, below(mixed(keys, _SECOND_OPERATION), count)
        return first, (first + 1 + below(mixed(keys, _SECOND_OPERATION), count - 1)) % count

    def _applied(
        self,
        sequences: Ragged,
        operation: Int64[np.ndarray, " rows"],
        keys: UInt64[np.ndarray, " rows"],
    ) -> Ragged:
        """Each row after its own operation; the others' share of it is nothing."""
        lengths = sequences.lengths
        changes = lengths > 1
        crop_to = lengths
        for number, name in enumerate(self.operations):
            applies = changes & (operation == number)
            if name == "crop":
                kept = np.maximum(share_of(lengths, 1.0 - self.crop_ratio), 1)
                crop_to = np.where(applies, kept, lengths)
            elif name == "mask":
                hidden = np.where(applies, share_of(lengths, self.mask_ratio), 0)
                sequences = mask(sequences, hidden, keys, self.mask_id)
            elif name == "reorder":
                width = np.where(applies, share_of(lengths, self.reorder_ratio), 0)
                sequences = reorder(sequences, width, keys)
            elif self.correlated is not None:
                least_one = np.maximum(share_of(lengths, self.substitute_ratio), 1)
                replaced = np.where(applies, least_one, 0)
                among = self.substitute_among
                sequences = substitute(sequences, replaced, keys, self.correlated, among)
        # Last, because it alone changes the lengths that the others go by.
        return crop(sequences, crop_to, keys)


_COUNT, _ITEM, _GAP = 21, 22, 23
"""Purposes of draws of noise."""


def with_random_items(
    histories: Ragged,
    max_len: int,
    share: float,
    num_items: int,
    keys: UInt64[np.ndarray, " rows"],
) -> Ragged:
    """Histories with random items put between their own.

    Of a history the newest L <= max_len items are what a model reads. floor(share * L + u) items go
    in, with one u in [0, 1) a row, so that the mean over rows is share * L: rounded down, 5 % would
    leave every history of less than 20 items clean. Rows keep their u, so a larger share never puts
    fewer items in. Each is drawn uniformly and apart from the others from the items that are
    nowhere in the whole history (the target may be among them), and goes into one of the L + 1
    gaps, before the oldest and behind the newest included, drawn uniformly too. Then the oldest,
    noise or not, leave until max_len are left.

    Args:
        histories: Rows of items 1..num_items, oldest first.
        max_len: Items that a model reads.
        share: Of the items read.
        num_items: Items of the catalog, V; a row that has met all of them stays as it is.
        keys: One a row: the same key, history and share give the same noise.
    """
    window = histories.newest(max_len)
    start = (mixed(keys, _COUNT) >> np.uint64(11)).astype(np.float64) / (1 << 53)
    counts = np.floor(share * window.lengths + start).astype(np.int64)
    known, num_known = _known_items(histories)
    counts = np.where(num_known < num_items, counts, 0)
    rows = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    draws = mixed(keys[rows], number)
    choice = below(mixed(draws, _ITEM), (num_items - num_known)[rows])
    gap = below(mixed(draws, _GAP), window.lengths[rows] + 1)
    return _inserted(window, _unknown_items(known, rows, choice), rows, gap).newest(max_len)


def _known_items(histories: Ragged) -> tuple[Ragged, Int64[np.ndarray, " rows"]]:
    """The different items of each row, rising, and how many they are."""
    order = np.lexsort((histories.values, histories.rows))
    rows, values = histories.rows[order], histories.values[order]
    is_first = np.ones(len(values), dtype=bool)
    is_first[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    known = Ragged(values, histories.offsets).keep(is_first)
    return known, known.lengths


def _unknown_items(
    known: Ragged, rows: Int64[np.ndarray, " noise"], choice: Int64[np.ndarray, " noise"]
) -> Int64[np.ndarray, " noise"]:
    """The choice-th item, from 0, of those that a row does not know."""
    # Before the j-th known item there are so many unknown ones; as many known items as have no
    # more than `choice` before them lie below the answer.
    unknown_before = known.values - 1 - known.positions
    width = int(max(unknown_before.max(initial=0), choice.max(initial=0))) + 1
    places = known.rows * width + unknown_before
    below_it = np.searchsorted(places, rows * width + choice, side="right") - known.offsets[rows]
    return 1 + choice + below_it


def _inserted(
    sequences: Ragged,
    items: Int64[np.ndarray, " noise"],
    rows: Int64[np.ndarray, " noise"],
    gap: Int64[np.ndarray, " noise"],
) -> Ragged:
    """Each row with items put in front of its gap-th own one, in the order given within a gap."""
    all_rows = np.concatenate([sequences.rows, rows])
    place = np.concatenate([2 * sequences.positions + 1, 2 * gap])
    order = np.lexsort((place, all_rows))  # stable
    lengths = sequences.lengths + np.bincount(rows, minlength=len(sequences.lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(np.concatenate([sequences.values, items])[order], offsets)
