from math import log2

import numpy as np
import pytest

from distrl.ops.metrics import MISS, RankCounts, bucket_labels

BOUNDS = (5, 8)


def counts_of(ranks, lengths, max_rank=20):
    return RankCounts.of(np.array(ranks), np.array(lengths), BOUNDS, max_rank)


def test_metrics_are_means_over_all_cases_including_misses():
    # Four users: found first, found third, found sixth, never ranked.
    metrics = counts_of([1, 3, 6, MISS], [5, 5, 5, 5]).metrics([5, 10])

    assert metrics["hr_at_5"] == 2 / 4
    assert metrics["hr_at_10"] == 3 / 4
    assert metrics["ndcg_at_5"] == pytest.approx((1 / log2(2) + 1 / log2(4)) / 4, rel=1e-15)
    assert metrics["ndcg_at_10"] == pytest.approx((1 + 1 / 2 + 1 / log2(7)) / 4, rel=1e-15)
    assert metrics["mrr_at_5"] == pytest.approx((1 + 1 / 3) / 4, rel=1e-15)
    assert metrics["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 4, rel=1e-15)


def test_a_rank_counts_at_its_own_cutoff_and_not_below():
    metrics = counts_of([5, 20, 21], [9, 9, 9]).metrics([4, 5, 19, 20])

    assert metrics["hr_at_4"] == 0
    assert metrics["hr_at_5"] == 1 / 3
    assert metrics["hr_at_19"] == 1 / 3
    assert metrics["hr_at_20"] == 2 / 3


def test_cases_fall_into_the_bucket_of_their_length():
    counts = counts_of([1, 2, 2, MISS, 1], [3, 5, 6, 8, 9])

    assert [(label, cases) for label, cases, _ in counts.by_length([5])] == [
        ("<=5", 2),
        ("6-8", 2),
        (">8", 1),
    ]
    assert [row["mrr_at_5"] for _, _, row in counts.by_length([5])] == [
        (1 + 1 / 2) / 2,
        (1 / 2) / 2,
        1.0,
    ]


def test_an_empty_bucket_has_zero_metrics():
    (_, _, (label, cases, metrics)) = counts_of([1], [5]).by_length([5])
    assert (label, cases, metrics) == (
        ">8",
        0,
        {"hr_at_5": 0.0, "ndcg_at_5": 0.0, "mrr_at_5": 0.0},
    )


def test_merging_shards_is_counting_them_together():
    ranks, lengths = [1, 7, 30, MISS, 2, 2], [5, 6, 7, 8, 9, 300]
    whole = counts_of(ranks, lengths)
    parts = (
        RankCounts.empty(BOUNDS, 20)
        + counts_of(ranks[4:], lengths[4:])
        + counts_of(ranks[:4], lengths[:4])
    )

    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.num_cases == 6


def test_counts_with_other_buckets_do_not_merge():
    with pytest.raises(ValueError, match="cannot be merged"):
        _ = RankCounts.empty((5,), 20) + RankCounts.empty((6,), 20)
    with pytest.raises(ValueError, match="cannot be merged"):
        _ = RankCounts.empty((5,), 20) + RankCounts.empty((5,), 10)


def test_a_cutoff_beyond_the_counted_ranks_is_an_error():
    with pytest.raises(ValueError, match=r"1\.\.20"):
        counts_of([1], [5]).metrics([50])


def test_labels_name_their_lengths():
    assert bucket_labels((5, 8, 20, 50)) == ["<=5", "6-8", "9-20", "21-50", ">50"]
    assert bucket_labels((5, 6)) == ["<=5", "6", ">6"]
    assert bucket_labels(()) == ["all"]
