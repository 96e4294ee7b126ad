"""The baselines among sampled candidates: the target and items that the user has never met."""

import numpy as np
from jaxtyping import Int64

from distrl.ops.held_out import Cases
from distrl.ops.metrics import MISS
from distrl.schema import PAD_ID
from distrl.train.baselines import seen_targets


def shared_popularity_ranks(counts: Int64[np.ndarray, " items"]) -> Int64[np.ndarray, " items"]:
    """Rank of each item by falling count, the same for equal counts; PAD (row 0) ranks nowhere.

    Args:
        counts: Occurrences of items 0..V in the training parts of the sequences.
    """
    of_items = -counts[PAD_ID + 1 :]
    ranks = np.full(len(counts), MISS, dtype=np.int64)
    ranks[PAD_ID + 1 :] = 1 + np.searchsorted(np.sort(of_items), of_items)
    return ranks


def sampled_popularity(
    cases: Cases,
    negatives: Int64[np.ndarray, "cases negatives"],
    ranks: Int64[np.ndarray, " items"],
) -> Int64[np.ndarray, " cases"]:
    """Ranks of the targets by popularity, ties against them.

    Args:
        cases: In the store's ids, as are the negatives.
        negatives: Each target's other candidates.
        ranks: Those of `shared_popularity_ranks`.
    """
    return 1 + (ranks[negatives] <= ranks[cases.targets][:, None]).sum(axis=1)


def sampled_recency(cases: Cases) -> Int64[np.ndarray, " cases"]:
    """First where the user has met the target: of the candidates it is the only one that is named.

    All others are misses.
    """
    return np.where(seen_targets(cases), 1, MISS)
