"""Random damage to sequences, with the operations that undo it: what an augmenter learns from.

Everything is flat: an operation a token, and a row of items to put back a token. A draw is a hash
of a row's key, a purpose and a place, so a row's damage is the same in any batch, in any order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import below, mixed

KEEP, DELETE, INSERT = 0, 1, 2
"""What undoes the damage at a token: nothing, dropping it, or putting items in front of it."""

_NUM_RANDOM, _NUM_DELETED, _ITEM = 31, 32, 33
"""Purposes of draws, apart from those of `distrl.ops.sequences`."""


class Corrupted(NamedTuple):
    """Damaged sequences and how to undo the damage: `applied(*corrupted)` is what they were."""

    sequences: Ragged
    """What the augmenter reads."""
    operations: Int64[np.ndarray, " tokens"]
    """KEEP, DELETE or INSERT for each of its tokens."""
    inserted: Ragged
    """A row a token of `sequences`: what was deleted directly in front of it, nearest first. Empty
    unless the operation is INSERT. No end marker: that is for who predicts the rows."""


class _Turns(NamedTuple):
    """What is decided at some of the items, in order of their place."""

    at: Int64[np.ndarray, " turns"]
    """Index of the item that each decision is about."""
    num_random: Int64[np.ndarray, " turns"]
    """Random items put in front of it."""
    num_deleted: Int64[np.ndarray, " turns"]
    """Items deleted from it on; the one behind them gets them back. With 0 it is kept itself."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """How sequences are damaged.

    From the oldest item on, one of three things happens. `keep` copies the item. `delete` drops it
    and goes on dropping while the next draw says so too, at most `max_inserted` items and never the
    last; the item behind them is copied and is the one that gets them back, and nothing else
    happens to it. `insert` puts in a random item that is not in the row and was not put in before,
    while fewer than `max_len` are left, and the same item is up again. What is not allowed is drawn
    again; an item to which nothing allowed can happen is kept.

    Two draws an item have the same outcome as one after the other: the number of insertions is
    geometric, cut off where no room is left, and the number of deletions apart from it. In front of
    the last item, which is not deleted, an insertion has probability insert / (keep + insert).

    Source: the released code of STEAM (arXiv:2303.02297), which that of TCLARec
        (doi:10.1145/3726302.3730101) repeats. Its condition that a deletion leaves one item is not
        spelled out here: an item that is not the last has one behind it.
    """

    keep: float
    delete: float
    insert: float
    """Probabilities; whoever configures them checks that they sum to 1."""
    num_items: int
    """Items of the catalog, V."""
    max_len: int
    """A row gets no random item while it has this many items; one with more does not grow."""
    max_inserted: int = 5
    """Most items deleted in a row, so most items that one token gets back."""

    def draw(self, sequences: Ragged, keys: UInt64[np.ndarray, " rows"]) -> Corrupted:
        """Damage to each row, different for different keys.

        Args:
            sequences: Rows of items 1..num_items; empty ones stay so.
            keys: One a row.
        """
        turns = self._turns(sequences, keys)
        ends = np.cumsum(turns.num_random + 1)
        before = np.searchsorted(turns.at, sequences.offsets)
        offsets = np.concatenate([[0], ends])[before]
        num_tokens = int(offsets[-1])
        # Each turn leaves its random items, then one of the row's own.
        own = ends - 1
        is_random = np.ones(num_tokens, dtype=bool)
        is_random[own] = False
        values = np.empty(num_tokens, dtype=np.int64)
        values[own] = sequences.values[turns.at + turns.num_deleted]
        values[is_random] = self._random_items(sequences, np.diff(offsets) - np.diff(before), keys)
        operations = np.full(num_tokens, DELETE)
        operations[own] = np.where(turns.num_deleted > 0, INSERT, KEEP)
        inserted = _deleted_items(sequences, turns, own, num_tokens)
        return Corrupted(Ragged(values, offsets), operations, inserted)

    def _turns(self, sequences: Ragged, keys: UInt64[np.ndarray, " rows"]) -> _Turns:
        """Which items are up, and what happens there.

        What would happen at each item is drawn for all; one after the other, in all rows at once,
        is only who is up and what still fits.
        """
        num_random, num_deleted = self._counts(sequences, keys)
        rows = np.flatnonzero(sequences.lengths)
        at, stop = sequences.offsets[:-1][rows], sequences.offsets[1:][rows]
        length, unused = sequences.lengths[rows], self._num_unused(sequences)[rows]
        put = np.full(len(sequences.values), -1)
        while len(at):
            fits = np.maximum(np.minimum(self.max_len - length, unused), 0)
            added, removed = np.minimum(num_random[at], fits), num_deleted[at]
            put[at] = added
            length, unused, at = length + added - removed, unused - added, at + removed + 1
            going = at < stop
            at, stop, length, unused = at[going], stop[going], length[going], unused[going]
        is_up = np.flatnonzero(put >= 0)
        return _Turns(is_up, put[is_up], num_deleted[is_up])

    def _counts(
        self, sequences: Ragged, keys: UInt64[np.ndarray, " rows"]
    ) -> tuple[Int64[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]]:
        """Random items in front of each item, and deletions from it on, if it were up."""
        rows, places = sequences.rows, sequences.positions
        draws = mixed(mixed(keys, _NUM_RANDOM)[rows], places)
        last = sequences.offsets[1:][sequences.lengths > 0] - 1
        repeats = np.arange(1, self.max_len + 1)
        num_random = _counted(draws, self.insert**repeats)
        num_random[last] = _counted(draws[last], _share(self.insert, self.keep) ** repeats)

        draws = mixed(mixed(keys, _NUM_DELETED)[rows], places)
        at_least = _share(self.delete, self.keep) * self.delete ** np.arange(self.max_inserted)
        until_last = sequences.lengths[rows] - 1 - places
        return num_random, np.minimum(_counted(draws, at_least), until_last)

    def _num_unused(self, sequences: Ragged) -> Int64[np.ndarray, " rows"]:
        """Items of the catalog that each row does not hold."""
        width = self.num_items + 1
        known = np.unique(sequences.rows * width + sequences.values)
        first = np.searchsorted(known, np.arange(len(sequences.offsets)) * width)
        return self.num_items - np.diff(first)

    def _random_items(
        self,
        sequences: Ragged,
        counts: Int64[np.ndarray, " rows"],
        keys: UInt64[np.ndarray, " rows"],
    ) -> Int64[np.ndarray, " random"]:
        """`counts` different items for each row that it does not hold, any order as likely."""
        width = self.num_items + 1
        rows = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        draws = mixed(mixed(keys, _ITEM)[rows], number)
        items = np.empty(len(rows), dtype=np.int64)
        taken = sequences.rows * width + sequences.values
        undecided, attempt = np.arange(len(rows)), 0
        while len(undecided):
            items[undecided] = 1 + below(mixed(draws[undecided], attempt), self.num_items)
            asked = rows[undecided] * width + items[undecided]
            together = np.concatenate([taken, asked])
            # Of equal ones `first` names the one that comes first, so what is taken stays.
            taken, first = np.unique(together, return_index=True)
            is_free = np.zeros(len(together), dtype=bool)
            is_free[first] = True
            undecided, attempt = undecided[~is_free[-len(undecided) :]], attempt + 1
        return items


def applied(
    sequences: Ragged, operations: Int64[np.ndarray, " tokens"], inserted: Ragged
) -> Ragged:
    """The sequences after the operations: fewer, more or other items, the same rows.

    Args:
        sequences: Rows of any length.
        operations: KEEP, DELETE or INSERT for each token. One with INSERT is kept, behind its row
            of `inserted`.
        inserted: A row a token, nearest first: the first item of the row ends up next to the token.
            Rows of tokens with another operation are ignored.

    Returns:
        One row for each of `sequences`; it is empty where all was deleted.
    """
    anchors = np.flatnonzero(operations == INSERT)
    put = inserted.take(anchors)
    sizes = (operations != DELETE).astype(np.int64)
    kept = np.flatnonzero(sizes)
    sizes[anchors] += put.lengths
    ends = np.concatenate([[0], np.cumsum(sizes)])
    values = np.empty(ends[-1], dtype=np.int64)
    values[ends[kept + 1] - 1] = sequences.values[kept]
    values[np.repeat(ends[anchors + 1] - 2, put.lengths) - put.positions] = put.values
    return Ragged(values, ends[sequences.offsets])


def _deleted_items(
    sequences: Ragged, turns: _Turns, own: Int64[np.ndarray, " turns"], num_tokens: int
) -> Ragged:
    """What each of `num_tokens` damaged tokens gets back; turn t left its own item at own[t]."""
    counts = turns.num_deleted
    lengths = np.zeros(num_tokens, dtype=np.int64)
    lengths[own] = counts
    # Backwards from the item in front of the one that was copied.
    nearest = np.repeat(turns.at + counts - 1, counts)
    steps = np.arange(len(nearest)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Ragged(sequences.values[nearest - steps], np.concatenate([[0], np.cumsum(lengths)]))


def _counted(
    keys: UInt64[np.ndarray, " n"], at_least: Float64[np.ndarray, " most"]
) -> Int64[np.ndarray, " n"]:
    """A number in 0..most for each key: with probability at_least[k - 1] it is k or more."""
    uniform = (keys >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return len(at_least) - np.searchsorted(at_least[::-1], uniform, side="right")


def _share(chance: float, other: float) -> float:
    """Probability of one of two things, 0 if neither can happen."""
    return chance / (chance + other) if chance > 0 else 0.0
