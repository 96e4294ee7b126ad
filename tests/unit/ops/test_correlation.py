from itertools import combinations
from math import log, sqrt

import numpy as np
import pytest

from distrl.ops import correlation
from distrl.ops.correlation import (
    UNIT,
    RunningSums,
    Sums,
    all_users,
    distinct,
    items_of,
    most_correlated,
    split,
    sums_of_users,
    users_of,
)
from distrl.ops.ragged import Ragged

THREE_USERS = [[1, 2, 3], [1, 2], [2, 3, 2]]
BASE = 6
"""Five items, of which nobody has 4 and 5."""


def similarities(histories, window):
    """The module's formula in plain Python: slow, and too plain to be wrong."""
    users, together = {}, {}
    for history in histories:
        items = list(dict.fromkeys(history))
        for item in items:
            users[item] = users.get(item, 0) + 1
        for (a, i), (b, j) in combinations(enumerate(items), 2):
            if b - a < window:
                weight = 1 / log(1 + len(items))
                together[i, j] = together.get((i, j), 0) + weight
                together[j, i] = together.get((j, i), 0) + weight
    return {(i, j): sum_ / sqrt(users[i] * users[j]) for (i, j), sum_ in together.items()}


def added_up(histories, window=50, base=BASE):
    held = RunningSums()
    for block in sums_of_users(Ragged.of(histories), window, base):
        held.add(block)
    return held.whole()


def lists(histories, num_items, count, window=50, num_partitions=1):
    """The most correlated items of every item, as the job computes them, without Ray."""
    base = num_items + 1
    parts = split(added_up(histories, window, base), num_partitions, base)
    items = [items_of(part, num_partitions, num_items) for part in range(num_partitions)]
    users = all_users([users_of(*pair, base) for pair in zip(parts, items, strict=True)], num_items)
    found = {}
    for part, of_part in zip(parts, items, strict=True):
        rows = most_correlated(part, of_part, users, count)
        cut = np.split(rows.values, rows.offsets[1:-1])
        found |= dict(zip(of_part.tolist(), [row.tolist() for row in cut], strict=True))
    return found


def random_histories(seed, users, num_items, longest):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, users)
    return [(rng.zipf(1.4, length) % num_items + 1).tolist() for length in lengths]


def test_three_users_worked_by_hand():
    sums = added_up(THREE_USERS)
    # Keys are 6 i + j; of the key 6 i the value is the number of users who have i.
    assert dict(zip(sums.keys.tolist(), sums.values.tolist(), strict=True)) == {
        6: 2, 12: 3, 18: 2,
        8: round(UNIT / log(4)) + round(UNIT / log(3)),  # 1 and 2: A with 3 items, B with 2
        9: round(UNIT / log(4)),  # 1 and 3: A
        15: round(UNIT / log(4)) + round(UNIT / log(3)),  # 2 and 3: A, and C with 2 different ones
    }  # fmt: skip
    likeness = similarities(THREE_USERS, 50)
    assert likeness[1, 2] == (1 / log(4) + 1 / log(3)) / sqrt(2 * 3)
    assert likeness[1, 3] == (1 / log(4)) / sqrt(2 * 2)
    # 1 and 3 are as correlated with 2: the lower id comes first. 4 and 5 have nobody.
    expected = {1: [2, 3], 2: [1, 3], 3: [2, 1], 4: [], 5: []}
    assert lists(THREE_USERS, num_items=5, count=2) == expected
    assert lists(THREE_USERS, num_items=5, count=1) == {item: x[:1] for item, x in expected.items()}


def test_a_user_of_many_items_says_less_than_one_of_few():
    # 1 meets 2 in a history of 2 items, and 3 in one of 6; all else is equal.
    histories = [[1, 2], [1, 3, 4, 5, 6, 7], [2, 8, 9, 10, 11, 12], [3, 13]]
    assert lists(histories, num_items=13, count=1)[1] == [2]


def test_an_item_that_everybody_has_says_less_than_a_rare_one():
    histories = [[1, 2, 3], [1, 2, 3], [4, 2, 5], [6, 2, 7], [8, 2]]
    assert lists(histories, num_items=8, count=2)[1] == [3, 2]


@pytest.mark.parametrize("window", [2, 3, 7, 100])
def test_lists_are_the_most_similar_of_the_formula(window):
    histories = random_histories(1, users=200, num_items=40, longest=25)
    likeness = similarities(histories, window)
    found = lists(histories, num_items=40, count=5, window=window)
    assert sum(map(len, found.values())) > 100
    for item in range(1, 41):
        best = sorted((s for (i, _), s in likeness.items() if i == item), reverse=True)[:5]
        assert [likeness[item, other] for other in found[item]] == pytest.approx(best, abs=1e-8)
        assert len(set(found[item])) == len(found[item])


def test_partitions_and_blocks_change_nothing(monkeypatch):
    histories = random_histories(2, users=300, num_items=31, longest=30)
    whole = lists(histories, num_items=31, count=4)
    for num_partitions in (2, 5, 31):
        assert lists(histories, 31, 4, num_partitions=num_partitions) == whole
    monkeypatch.setattr(correlation, "BLOCK_PAIRS", 7)
    assert len(list(sums_of_users(Ragged.of(histories), 50, 32))) > 100
    assert lists(histories, 31, 4, num_partitions=3) == whole


def test_users_in_any_order_and_grouping_give_equal_sums():
    histories = random_histories(3, users=120, num_items=20, longest=15)
    one, other = RunningSums(), RunningSums()
    one.add(added_up(histories, base=21))
    for start in range(0, 120, 17):
        other.add(added_up(histories[::-1][start : start + 17], base=21))
    assert one.whole().keys.tolist() == other.whole().keys.tolist()
    assert one.whole().values.tolist() == other.whole().values.tolist()


def test_running_sums_hold_little_more_than_what_is_different(monkeypatch):
    monkeypatch.setattr(correlation, "BLOCK_PAIRS", 10)
    held, most = RunningSums(), 0
    for _ in range(50):
        held.add(Sums(np.arange(8), np.ones(8, dtype=np.int64)))
        most = max(most, len(held))
    assert most <= 10 + 8
    assert held.whole().values.tolist() == [50] * 8
    assert len(held) == 8


def test_distinct_keeps_first_meetings_in_their_order():
    rows = distinct(Ragged.of([[3, 1, 3, 2, 1], [], [2, 2], [1]]))
    assert rows.values.tolist() == [3, 1, 2, 2, 1]
    assert rows.lengths.tolist() == [3, 0, 1, 1]


def test_nobody_correlates_nothing():
    assert lists([[], []], num_items=3, count=2) == {1: [], 2: [], 3: []}
    assert lists([[2], [3]], num_items=3, count=2, num_partitions=2) == {1: [], 2: [], 3: []}
