"""The nearest vectors by cosine, exactly, in blocks of bounded memory.

Vectors are kept as float16, which is what a table of neighbors holds. A direction is such a vector
divided by its norm, its components rounded to multiples of 2^-24. Products of these are multiples
of 2^-48 that sum to at most 1, so a similarity in float64 has no rounding error in any order of
summation: results do not depend on blocks, threads or the linear algebra library, and equal vectors
tie in every bit. Products in float32, at twice the speed, only say which pairs are worth that.

Dimensions: Q queries, P vectors of a pool, D components, K neighbors.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Float32, Float64, Int64

_GRID = 2.0**24
_PAIRS_AT_ONCE = 1 << 15
_ADDED_AT_ONCE = 1 << 20
_LOWEST = -2.0
"""Below every similarity, above what no neighbor can be."""


class Pool(NamedTuple):
    """Vectors to find neighbors among, a part of all; an all-zero vector is nobody's neighbor."""

    vectors: Float16[np.ndarray, "P D"]
    groups: Int64[np.ndarray, " P"]
    """Vectors of the same group are no neighbors. They rise, and a group is in one part."""
    sought: Bool[np.ndarray, " P"]
    """Whether the vector's own neighbors are wanted; never of an all-zero one."""


class Queries(NamedTuple):
    """Vectors whose neighbors are sought, none of them zero."""

    directions: Float32[np.ndarray, "Q D"]
    groups: Int64[np.ndarray, " Q"]
    group_first: Int64[np.ndarray, " Q"]
    """Number of the first vector in the group of each."""
    group_sizes: Int64[np.ndarray, " Q"]
    """Vectors in the group of each."""

    @classmethod
    def of(cls, pool: Pool, first: int, rows: Int64[np.ndarray, " rows"]) -> "Queries":
        """Those of some rows of a part whose neighbors are wanted, in their order.

        Args:
            pool: The part.
            first: The number of its first vector.
            rows: Of the part.
        """
        rows = rows[pool.sought[rows]]
        groups = pool.groups[rows]
        low = np.searchsorted(pool.groups, groups)
        sizes = np.searchsorted(pool.groups, groups, side="right") - low
        return cls(directions_of(pool.vectors[rows]), groups, first + low, sizes)

    @classmethod
    def joined(cls, pieces: Sequence["Queries"]) -> "Queries":
        """All of several."""
        return cls(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))

    def take(self, rows: Int64[np.ndarray, " taken"] | slice) -> "Queries":
        """Some of the queries."""
        return Queries(*(column[rows] for column in self))


def directions_of(vectors: Float16[np.ndarray, "P D"]) -> Float32[np.ndarray, "P D"]:
    """Vectors of length 1 on the grid that makes products exact; zero stays zero."""
    wide = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    wide *= (_GRID / np.where(norms > 0, norms, 1.0))[:, None]
    np.rint(wide, out=wide)
    wide /= _GRID
    return wide.astype(np.float32)


class Best:
    """The K nearest of each query so far: more similar first, and among equals the lower number."""

    def __init__(self, num_queries: int, num_neighbors: int) -> None:
        self.scores: Float64[np.ndarray, "Q K"] = np.full((num_queries, num_neighbors), -np.inf)
        self.numbers: Int64[np.ndarray, "Q K"] = np.full((num_queries, num_neighbors), -1)
        """-1 where there are fewer neighbors than K."""

    @property
    def least(self) -> Float64[np.ndarray, " Q"]:
        """Similarity of the last neighbor; -inf where there are fewer than K."""
        return self.scores[:, -1]

    def add(
        self,
        rows: Int64[np.ndarray, " pairs"],
        scores: Float64[np.ndarray, " pairs"],
        numbers: Int64[np.ndarray, " pairs"],
    ) -> None:
        """Considers further pairs of a query and a numbered vector, each of them once."""
        better = scores >= self.least[rows]
        rows, scores, numbers = rows[better], scores[better], numbers[better]
        touched, rows = np.unique(rows, return_inverse=True)
        width = self.scores.shape[1]
        rows = np.concatenate([np.repeat(np.arange(len(touched)), width), rows])
        scores = np.concatenate([self.scores[touched].ravel(), scores])
        numbers = np.concatenate([self.numbers[touched].ravel(), numbers])
        order = np.lexsort((numbers, -scores, rows))
        starts = np.searchsorted(rows[order], np.arange(len(touched)))
        kept = order[starts[:, None] + np.arange(width)]
        self.scores[touched], self.numbers[touched] = scores[kept], numbers[kept]

    def merge(self, other: "Best", first: int = 0) -> None:
        """Considers what was found for the queries from `first` on among other vectors."""
        rows, places = np.nonzero(other.numbers >= 0)
        self.add(first + rows, other.scores[rows, places], other.numbers[rows, places])


def nearest(
    queries: Queries, pools: Iterable[tuple[int, Pool]], num_neighbors: int, block_bytes: int
) -> Best:
    """The nearest vectors of each query.

    Args:
        queries: Whose neighbors are sought.
        pools: The vectors in pieces, each with the number of its first.
        num_neighbors: K.
        block_bytes: Of the similarities that are held at a time.
    """
    best = Best(len(queries.groups), num_neighbors)
    side = max(1, int((block_bytes / 4) ** 0.5))
    # A rounding error in each of D products and sums of float32, and that of the threshold.
    slack = 1.01 * (queries.directions.shape[1] + 2) * 2.0**-24
    for first, pool in pools:
        for low in range(0, len(pool.groups), side):
            directions = directions_of(pool.vectors[low : low + side])
            groups = pool.groups[low : low + side]
            present = directions.any(axis=1)
            for start in range(0, len(queries.groups), side):
                here = slice(start, start + side)
                rough = queries.directions[here] @ directions.T
                rough[:, ~present] = -np.inf
                rows, columns = _worth_it(
                    rough, best.least[here], queries.groups[here], groups, num_neighbors, slack
                )
                scores = pair_scores(queries.directions[here], rows, directions, columns)
                best.add(start + rows, scores, first + low + columns)
    return best


def _worth_it(
    rough: Float32[np.ndarray, "Q P"],
    least: Float64[np.ndarray, " Q"],
    query_groups: Int64[np.ndarray, " Q"],
    groups: Int64[np.ndarray, " P"],
    num_neighbors: int,
    slack: float,
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Rows and columns of all pairs that can be among the nearest, and of few others."""
    floor = least - slack
    unfilled = np.flatnonzero(np.isneginf(floor))
    if len(unfilled) and rough.shape[1] >= num_neighbors:
        others = rough[unfilled]
        others[query_groups[unfilled, None] == groups] = -np.inf
        floor[unfilled] = np.partition(others, -num_neighbors)[:, -num_neighbors] - 2 * slack
    # Down to float32: a threshold must not be rounded up.
    floor32 = np.nextafter(np.maximum(floor, _LOWEST).astype(np.float32), np.float32(-3))
    flat = np.flatnonzero(rough >= floor32[:, None])
    rows, columns = np.divmod(flat, rough.shape[1])
    kept = query_groups[rows] != groups[columns]
    return rows[kept], columns[kept]


def pair_scores(
    first: Float32[np.ndarray, "Q D"],
    rows: Int64[np.ndarray, " pairs"],
    second: Float32[np.ndarray, "P D"],
    columns: Int64[np.ndarray, " pairs"],
) -> Float64[np.ndarray, " pairs"]:
    """Cosines of pairs of directions, without rounding error."""
    scores = np.empty(len(rows))
    for low in range(0, len(rows), _PAIRS_AT_ONCE):
        here = slice(low, low + _PAIRS_AT_ONCE)
        left, right = first[rows[here]], second[columns[here]]
        scores[here] = np.einsum("ij,ij->i", left, right, dtype=np.float64)
    return scores


def among(
    queries: Queries,
    candidates: Int64[np.ndarray, "Q C"],
    pools: Iterable[tuple[int, Pool]],
    num_neighbors: int,
) -> Best:
    """The nearest of some candidates of each query: numbers of vectors, or -1 for none.

    Some 60 bytes are held for each candidate, and the vectors of few of them at a time.

    Args:
        queries: Whose neighbors are sought.
        candidates: Of each.
        pools: The vectors in pieces, each with the number of its first; gone through once.
        num_neighbors: K.
    """
    best = Best(len(queries.groups), num_neighbors)
    rows, places = np.nonzero(candidates >= 0)
    numbers = candidates[rows, places]
    order = np.argsort(numbers, kind="stable")
    rows, numbers = rows[order], numbers[order]
    scores = np.full(len(rows), -np.inf)
    for first, pool in pools:
        low, high = np.searchsorted(numbers, [first, first + len(pool.groups)]).tolist()
        for start in range(low, high, _PAIRS_AT_ONCE):
            here = slice(start, min(start + _PAIRS_AT_ONCE, high))
            scores[here] = _scores_within(queries, rows[here], pool, numbers[here] - first)
    for start in range(0, len(rows), _ADDED_AT_ONCE):
        here = slice(start, start + _ADDED_AT_ONCE)
        known = np.isfinite(scores[here])
        best.add(rows[here][known], scores[here][known], numbers[here][known])
    return best


def _scores_within(
    queries: Queries,
    rows: Int64[np.ndarray, " pairs"],
    pool: Pool,
    columns: Int64[np.ndarray, " pairs"],
) -> Float64[np.ndarray, " pairs"]:
    """Cosines of pairs of a query and a row of a piece; -inf where they are of the same group."""
    met, places = np.unique(columns, return_inverse=True)
    kept = queries.groups[rows] != pool.groups[columns]
    scores = np.full(len(rows), -np.inf)
    directions = directions_of(pool.vectors[met])
    scores[kept] = pair_scores(queries.directions, rows[kept], directions, places[kept])
    return scores


def recall(found: Best, exact: Best) -> float:
    """Share of the exact neighbors for which one as similar was found, whichever of several."""
    wanted = np.isfinite(exact.scores)
    last = np.where(wanted, exact.scores, np.inf).min(axis=1)
    hits = (np.isfinite(found.scores) & (found.scores >= last[:, None])).sum()
    return float(hits / max(wanted.sum(), 1))
