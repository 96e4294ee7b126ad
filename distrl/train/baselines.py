"""What any model has to beat: popularity, and the user's own past items, newest first."""

import numpy as np
from jaxtyping import Bool, Int64

from distrl.ops.held_out import Cases, last_occurrence, training_items
from distrl.ops.metrics import MISS
from distrl.schema import PAD_ID, Shard
from distrl.train.reading import ragged, shard_batches

USERS_AT_ONCE = 65536


def count_training_items(
    store_uri: str, shard: Shard, num_items: int
) -> Int64[np.ndarray, " items"]:
    """Occurrences of items 0..num_items in the training parts of a shard's sequences."""
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for batch in shard_batches(store_uri, shard, USERS_AT_ONCE, ["items"]):
        items = training_items(ragged(batch.column("items")))
        counts += np.bincount(items, minlength=num_items + 1)
    return counts


def popularity_ranks(counts: Int64[np.ndarray, " items"]) -> Int64[np.ndarray, " items"]:
    """Rank of each item by falling count, then rising id; PAD (row 0) ranks nowhere.

    Args:
        counts: Occurrences of items 0..V in the training parts of the sequences.
    """
    order = np.argsort(-counts[PAD_ID + 1 :], kind="stable") + PAD_ID + 1
    ranks = np.full(len(counts), MISS, dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def rank_by_popularity(
    cases: Cases, ranks: Int64[np.ndarray, " items"]
) -> tuple[Int64[np.ndarray, " cases"], Int64[np.ndarray, " cases"]]:
    """Ranks of the targets with seen items kept, and with seen items masked."""
    distinct = cases.histories.keep(last_occurrence(cases.histories))
    kept = ranks[cases.targets]
    before = ranks[distinct.values] < kept[distinct.rows]
    masked = kept - np.bincount(distinct.rows[before], minlength=len(kept))
    return kept, np.where(seen_targets(cases), MISS, masked)


def rank_by_recency(cases: Cases) -> Int64[np.ndarray, " cases"]:
    """Ranks among the user's distinct past items, newest first, and nothing else."""
    distinct = cases.histories.keep(last_occurrence(cases.histories))
    is_target = distinct.values == cases.targets[distinct.rows]
    from_end = distinct.offsets[1:][distinct.rows] - np.arange(len(distinct.values))
    ranks = np.full(len(cases.targets), MISS, dtype=np.int64)
    ranks[distinct.rows[is_target]] = from_end[is_target]
    return ranks


def seen_targets(cases: Cases) -> Bool[np.ndarray, " cases"]:
    """Which targets the user has met before; masking seen items makes them misses."""
    rows = cases.histories.rows
    met = np.zeros(len(cases.targets), dtype=bool)
    met[rows[cases.histories.values == cases.targets[rows]]] = True
    return met
