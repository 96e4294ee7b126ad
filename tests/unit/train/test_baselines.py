import numpy as np

from distrl.ops.held_out import held_out_cases
from distrl.ops.metrics import MISS
from distrl.ops.ragged import Ragged
from distrl.train.baselines import popularity_ranks, rank_by_popularity, rank_by_recency


def cases_of(*sequences):
    return held_out_cases(Ragged.of(sequences), "test")


def test_popularity_ranks_by_count_then_by_id():
    # PAD has a count by mistake and still ranks nowhere.
    ranks = popularity_ranks(np.array([99, 1, 4, 1, 0, 4]))
    assert ranks.tolist() == [MISS, 3, 1, 4, 5, 2]


def test_masking_seen_items_lifts_a_target_by_the_seen_items_before_it():
    ranks = popularity_ranks(np.array([0, 50, 40, 30, 20, 10]))
    # Items 1..5 rank 1..5. Seen 1 and 2 go before target 4, seen 5 behind target 3; each once.
    kept, masked = rank_by_popularity(cases_of([1, 2, 1, 4], [5, 3], [2, 2, 2, 3]), ranks)
    assert kept.tolist() == [4, 3, 3]
    assert masked.tolist() == [2, 3, 2]


def test_a_target_the_user_has_seen_is_a_miss_when_seen_items_are_masked():
    ranks = popularity_ranks(np.array([0, 5, 4, 3]))
    kept, masked = rank_by_popularity(cases_of([2, 1, 2], [1, 2]), ranks)
    assert kept.tolist() == [2, 2]
    assert masked.tolist() == [MISS, 1]


def test_repeat_recent_ranks_distinct_past_items_newest_first():
    cases = cases_of(
        [1, 2, 3, 3],  # target 3 was last: rank 1
        [1, 2, 3, 1],  # rank 3
        [1, 2, 1, 3, 2, 2, 1],  # newest first: 2, 3, 1
        [1, 2, 3, 4],  # new to the user
    )
    assert rank_by_recency(cases).tolist() == [1, 3, 3, MISS]
