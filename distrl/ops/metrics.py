"""Ranking metrics from counts of ranks: integers, so that merging shards is exact.

A leave-one-out case has one target, so a rank says everything: HR@k is 1 where rank <= k, NDCG@k is
1 / log2(rank + 1) there, MRR@k is 1 / rank there, and each is 0 elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

MISS = 0
"""The rank of a target that is not ranked at all."""

METRICS = ("hr", "ndcg", "mrr")


@dataclass(frozen=True, slots=True)
class RankCounts:
    """How many cases had their target at each rank, by the length of the user's sequence."""

    counts: Int64[np.ndarray, "buckets ranks"]
    """Column r - 1 counts rank r, the last column counts everything behind and every MISS."""
    length_bounds: tuple[int, ...]
    """Inclusive upper ends of the length buckets, rising; one more bucket takes what is longer."""

    @classmethod
    def empty(cls, length_bounds: tuple[int, ...], max_rank: int) -> "RankCounts":
        """No case yet; ranks up to `max_rank` will be told apart."""
        return cls(np.zeros((len(length_bounds) + 1, max_rank + 1), np.int64), length_bounds)

    @classmethod
    def of(
        cls,
        ranks: Int64[np.ndarray, " users"],
        lengths: Int64[np.ndarray, " users"],
        length_bounds: tuple[int, ...],
        max_rank: int,
    ) -> "RankCounts":
        """Counts one rank a user, 1 for the best and MISS for none, with the user's length."""
        bucket = np.searchsorted(np.asarray(length_bounds), lengths)
        column = np.where((ranks == MISS) | (ranks > max_rank), max_rank + 1, ranks) - 1
        shape = (len(length_bounds) + 1, max_rank + 1)
        flat = np.bincount(bucket * shape[1] + column, minlength=shape[0] * shape[1])
        return cls(flat.reshape(shape).astype(np.int64), length_bounds)

    def __add__(self, other: "RankCounts") -> "RankCounts":
        """Counts of both; exact, in any order."""
        if self.length_bounds != other.length_bounds or self.counts.shape != other.counts.shape:
            raise ValueError("rank counts with other length buckets or ranks cannot be merged")
        return RankCounts(self.counts + other.counts, self.length_bounds)

    @property
    def num_cases(self) -> int:
        """Cases counted, misses included."""
        return int(self.counts.sum())

    def metrics(self, cutoffs: Sequence[int]) -> dict[str, float]:
        """`hr_at_5`, `ndcg_at_5`, `mrr_at_5`, ...: means over all cases.

        Raises:
            ValueError: If a cutoff lies beyond the ranks that were told apart.
        """
        return metrics_of(self.counts.sum(axis=0), cutoffs)

    def by_length(self, cutoffs: Sequence[int]) -> list[tuple[str, int, dict[str, float]]]:
        """Label, number of cases and metrics of each length bucket, shortest first."""
        rows = zip(bucket_labels(self.length_bounds), self.counts, strict=True)
        return [(label, int(row.sum()), metrics_of(row, cutoffs)) for label, row in rows]


def metrics_of(counts: Int64[np.ndarray, " ranks"], cutoffs: Sequence[int]) -> dict[str, float]:
    """The metrics of one row of counts; all zero where it counts no case.

    Raises:
        ValueError: If a cutoff lies beyond the ranks that were told apart.
    """
    max_rank = counts.shape[0] - 1
    if not all(1 <= k <= max_rank for k in cutoffs):
        raise ValueError(f"cutoffs {tuple(cutoffs)} do not lie within 1..{max_rank}")
    rank = np.arange(1, max_rank + 1, dtype=np.float64)
    gains: dict[str, Float64[np.ndarray, " ranks"]] = {
        "hr": np.ones(max_rank),
        "ndcg": 1 / np.log2(rank + 1),
        "mrr": 1 / rank,
    }
    num_cases = max(int(counts.sum()), 1)
    return {
        f"{name}_at_{k}": float((counts[:k] * gains[name][:k]).sum() / num_cases)
        for name in METRICS
        for k in cutoffs
    }


def bucket_labels(length_bounds: Sequence[int]) -> list[str]:
    """`<=5`, `6-8`, ..., `>50` for the bounds 5, 8, ..., 50."""
    labels = [f"<={length_bounds[0]}"] if length_bounds else []
    for below, bound in pairwise(length_bounds):
        labels.append(f"{below + 1}-{bound}" if bound > below + 1 else str(bound))
    return [*labels, f">{length_bounds[-1]}" if length_bounds else "all"]
