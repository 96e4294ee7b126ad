"""Which items go together: item-based collaborative filtering with inverse user frequency.

    sim(i, j) = sum over users u who have both of 1 / log(1 + |items of u|) / sqrt(|U_i| |U_j|)

Source: CoSeRec (arXiv:2108.06479), its memory-based correlation, and `ItemCF_IUF` of the authors'
    code: the formula, the natural logarithm, and that an item counts once a user. Deviations:

    - The code leaves out each user's last three items, though it trains on the third of them as a
      target; callers here leave out two.
    - Pairs count within a window: of a user's different items, in the order in which they were
      first met, two that are less than `window` apart. The code counts all, which costs the square
      of a history's length; a window no shorter than the longest history equals it.
    - Sums are whole multiples of 2^-30, so that they are the same in any order and any split over
      tasks; each user adds an error of at most 2^-31.
    - Of equally correlated items the lower id comes first; in the code the one met first.
    - The paper's hybrid, which after some epochs also asks the learned item vectors and takes the
      more confident answer, is left out.

Nothing here loops over users. V items; a pair (i, j) is the key i * base + j with base = V + 1, and
the key of (i, 0) holds |U_i|.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

from distrl.ops.ragged import Ragged

UNIT = 1 << 30
"""What a sum counts in: 1 / UNIT."""
BYTES_PER_SUM = 16
BLOCK_PAIRS = 1 << 20
"""Pairs that are spelled out at once, about; a window's more at most."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums by key, rising keys, each once."""

    keys: Int64[np.ndarray, " sums"]
    values: Int64[np.ndarray, " sums"]
    """In 1 / UNIT where the key is a pair, users where it is an item alone."""

    @classmethod
    def of(cls, keys: Int64[np.ndarray, " n"], values: Int64[np.ndarray, " n"]) -> "Sums":
        """Adds up what has the same key."""
        order = np.argsort(keys, kind="stable")  # quick where pieces are sorted already
        keys, values = keys[order], values[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        return cls(keys[starts], np.add.reduceat(values, starts) if len(starts) else values)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class RunningSums:
    """Sums of what is added piece by piece; holds at most twice what the sums take, or a block."""

    _whole: Sums = field(
        default_factory=lambda: Sums(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    )
    _loose: list[Sums] = field(default_factory=list)
    _num_loose: int = 0

    def add(self, piece: Sums) -> None:
        """Takes one piece in."""
        self._loose.append(piece)
        self._num_loose += len(piece)
        # Merging in ever larger steps sorts a sum a few times in all, not once a piece.
        if self._num_loose >= max(len(self._whole), BLOCK_PAIRS):
            self.whole()

    def __len__(self) -> int:
        """Sums held, those of the same key in different pieces counted apart."""
        return len(self._whole) + self._num_loose

    def whole(self) -> Sums:
        """All that was added."""
        pieces = [self._whole, *self._loose]
        if self._loose:
            self._whole = Sums.of(
                np.concatenate([piece.keys for piece in pieces]),
                np.concatenate([piece.values for piece in pieces]),
            )
            self._loose, self._num_loose = [], 0
        return self._whole


def distinct(rows: Ragged) -> Ragged:
    """Each row without repeats, its items in the order in which they were first met."""
    order = np.lexsort((rows.values, rows.rows))  # stable
    row, value = rows.rows[order], rows.values[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (value[1:] != value[:-1])
    kept = np.zeros(len(order), dtype=bool)
    kept[order[is_first]] = True
    return rows.keep(kept)


def inverse_user_frequency(num_items: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """1 / log(1 + items of a user), at least one item, in 1 / UNIT."""
    return np.rint(UNIT / np.log1p(num_items)).astype(np.int64)


def sums_of_users(histories: Ragged, window: int, base: int) -> Iterator[Sums]:
    """What some users add: users by item, and pairs (lower id, higher id), a block at a time.

    Args:
        histories: Rows of items 1..base - 1, oldest first; repeats count once.
        window: See the module.
        base: Of the keys, V + 1.
    """
    rows = distinct(histories)
    yield Sums.of(rows.values * base, np.ones_like(rows.values))
    filled = np.maximum(rows.lengths, 1)
    weights = inverse_user_frequency(filled)[rows.rows]
    later = np.minimum(rows.lengths[rows.rows] - rows.positions, window) - 1
    blocks = np.cumsum(later) // BLOCK_PAIRS
    starts = np.flatnonzero(np.diff(blocks, prepend=-1)).tolist()
    for start, stop in pairwise([*starts, len(later)]):
        here, counts = np.arange(start, stop), later[start:stop]
        first = np.repeat(rows.values[here], counts)
        second = rows.pieces(here + 1, counts).values
        keys = np.minimum(first, second) * base + np.maximum(first, second)
        yield Sums.of(keys, np.repeat(weights[here], counts))


def split(sums: Sums, num_partitions: int, base: int) -> list[Sums]:
    """Both directions of each pair, and users by item, in the partitions of their first items.

    Partition p has the items p + 1, p + 1 + num_partitions, ..., so that frequent items, whose ids
    are low and whose pairs are many, are spread.
    """
    lower, higher = np.divmod(sums.keys, base)
    is_pair = higher > 0
    turned = (higher * base + lower)[is_pair]
    keys = np.concatenate([sums.keys, turned])
    values = np.concatenate([sums.values, sums.values[is_pair]])
    partition = (keys // base - 1) % num_partitions
    order = np.lexsort((keys, partition))
    keys, values = keys[order], values[order]
    cuts = np.searchsorted(partition[order], np.arange(num_partitions + 1))
    # Copies, so that a piece does not hold its whole block in memory.
    return [Sums(keys[a:b].copy(), values[a:b].copy()) for a, b in pairwise(cuts.tolist())]


def items_of(partition: int, num_partitions: int, num_items: int) -> Int64[np.ndarray, " items"]:
    """Ids of a partition's items, rising."""
    return np.arange(partition + 1, num_items + 1, num_partitions)


def users_of(
    sums: Sums, items: Int64[np.ndarray, " items"], base: int
) -> Int64[np.ndarray, " items"]:
    """|U_i| of each item, 0 where no user has it."""
    places = np.searchsorted(sums.keys, items * base)
    padded = np.append(sums.keys, -1)
    return np.where(padded[places] == items * base, np.append(sums.values, 0)[places], 0)


def all_users(
    by_partition: Sequence[Int64[np.ndarray, " _"]], num_items: int
) -> Int64[np.ndarray, " base"]:
    """|U_i| at index i, from those of every partition's items; nobody has item 0."""
    users = np.zeros(num_items + 1, dtype=np.int64)
    for partition, part in enumerate(by_partition):
        users[partition + 1 :: len(by_partition)] = part
    return users


def most_correlated(
    sums: Sums,
    items: Int64[np.ndarray, " items"],
    users: Int64[np.ndarray, " base"],
    count: int,
) -> Ragged:
    """For each item the `count` most similar others, best first; fewer where it has fewer.

    Args:
        sums: All sums whose first item is one of `items`.
        items: Rising.
        users: |U_i| at index i.
        count: Most others an item.

    Returns:
        A row for each of `items`.
    """
    item, other = np.divmod(sums.keys, len(users))
    is_pair = other > 0
    item, other = item[is_pair], other[is_pair]
    likeness = _similarity(sums.values[is_pair], users[item], users[other])
    order = np.lexsort((other, -likeness, item))
    item, other = item[order], other[order]
    starts = np.searchsorted(item, items)
    lengths = np.minimum(np.diff(starts, append=len(item)), count)
    return Ragged(other, np.append(starts, len(item))).pieces(starts, lengths)


def _similarity(
    sums: Int64[np.ndarray, " n"], users: Int64[np.ndarray, " n"], others: Int64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    return sums / UNIT / np.sqrt(users.astype(np.float64) * others.astype(np.float64))
