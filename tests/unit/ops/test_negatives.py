from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from distrl.ops.negatives import (
    NUM_NEGATIVES,
    UnseenItems,
    distinct_numbers,
    negative_keys,
    random_unseen_items,
)
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, seed_key


def keys_of(count, seed=3):
    return mixed(np.repeat(seed_key(seed), count), np.arange(count))


def negatives_of(lines, num_items, keys):
    unseen = UnseenItems.of(Ragged.of(lines), num_items)
    return random_unseen_items(unseen, NUM_NEGATIVES, keys)


def test_unseen_items_are_counted_past_the_known_ones():
    unseen = UnseenItems.of(Ragged.of([[3, 2, 3], [], [1, 6, 5], [6, 5, 4, 3, 2, 1]]), 6)
    assert unseen.counts.tolist() == [4, 6, 3, 0]
    unseen = UnseenItems.of(Ragged.of([[3, 2, 3], [], [1, 6, 5]]), 6)
    # The rows do not hold 1 4 5 6; 1 2 3 4 5 6; 2 3 4.
    places = np.array([[0, 1, 3], [0, 5, 2], [2, 1, 0]])
    assert unseen.at(places).tolist() == [[1, 4, 6], [1, 6, 3], [4, 3, 2]]


def test_negatives_are_99_different_items_outside_the_line():
    generator = np.random.default_rng(5)
    lines = [generator.integers(1, 301, length).tolist() for length in range(1, 150)]
    negatives = negatives_of(lines, 300, keys_of(len(lines)))
    assert negatives.shape == (149, 99)
    for line, items in zip(lines, negatives.tolist(), strict=True):
        assert len(set(items)) == 99
        assert not set(items) & set(line)
        assert min(items) >= 1
        assert max(items) <= 300


def test_who_has_exactly_99_unseen_items_gets_all_of_them():
    (items,) = negatives_of([[1, 50, 101]], 102, keys_of(1)).tolist()
    assert sorted(items) == [item for item in range(1, 103) if item not in (1, 50, 101)]


def test_too_few_unseen_items_are_refused():
    with pytest.raises(ValueError, match="98 unseen items, fewer than 99"):
        negatives_of([[1], [1, 2]], 100, keys_of(2))


def test_every_unseen_item_is_as_likely():
    num_users, known = 4000, [1, 2, 17, 60, 61, 62, 90, 129, 130, 5]
    negatives = negatives_of([known] * num_users, 130, keys_of(num_users))
    counts = np.bincount(negatives.ravel(), minlength=131)
    assert not counts[[0, *known]].any()
    found = np.delete(counts, [0, *known])
    # 99 of 120 without replacement: each is there with probability 0.825.
    chance = 99 / 120
    deviation = np.sqrt(num_users * chance * (1 - chance))
    assert np.abs(found - num_users * chance).max() < 5 * deviation
    # The counts of each user sum to 99, so the squares are chi-square of 119 degrees times 120/119.
    squares = (((found - num_users * chance) / deviation) ** 2).sum() * 119 / 120
    assert abs(squares - 119) < 5 * np.sqrt(2 * 119)


def test_every_set_of_numbers_is_as_likely():
    num_rows = 20000
    drawn = distinct_numbers(np.full(num_rows, 5), 2, keys_of(num_rows))
    sets = Counter(tuple(sorted(row)) for row in drawn.tolist())
    assert set(sets) == set(combinations(range(5), 2))
    # 2000 each, with a deviation of sqrt(20000 * 0.1 * 0.9) = 42.
    assert all(abs(count - 2000) < 5 * 42.5 for count in sets.values())


def test_a_large_catalog_is_covered_evenly():
    negatives = negatives_of([[7]] * 2000, 50001, keys_of(2000))
    counts, _ = np.histogram(negatives, bins=100, range=(1, 50002))
    # 198000 draws over 100 equal parts, which are nearly independent.
    squares = ((counts - 1980) ** 2 / 1980).sum()
    assert abs(squares - 99) < 5 * np.sqrt(2 * 99)


def test_negatives_follow_the_key_and_not_the_batch():
    lines = [[1 + i, 200 - i, 7] for i in range(20)]
    keys = keys_of(20)
    whole = negatives_of(lines, 200, keys)
    one_by_one = [negatives_of([line], 200, keys[i : i + 1])[0] for i, line in enumerate(lines)]
    np.testing.assert_array_equal(whole, one_by_one)
    other = negatives_of(lines, 200, keys_of(20, seed=4))
    shared = [len(set(one) & set(two)) for one, two in zip(whole, other, strict=True)]
    # Two sets of 99 of 197 share 49.7 by chance, with a deviation of 3.5.
    assert abs(np.mean(shared) - 99 * 99 / 197) < 5 * 3.5 / np.sqrt(20)


def test_the_splits_have_draws_of_their_own():
    users = keys_of(300)
    test, validation = (negative_keys(users, split) for split in ("test", "validation"))
    first, second = (negatives_of([[7]] * 300, 20000, keys) for keys in (test, validation))
    shared = [len(set(one) & set(other)) for one, other in zip(first, second, strict=True)]
    # 99 of 20000 twice share 0.49 items a user: as much as chance alone.
    assert abs(np.mean(shared) - 99 * 99 / 19999) < 5 * np.sqrt(0.49 / 300)


def test_no_users_have_no_negatives():
    assert negatives_of([], 200, keys_of(0)).shape == (0, 99)
