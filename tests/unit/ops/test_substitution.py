"""Semantic substitution: how many items become others, which ones, and that a key fixes it."""

import numpy as np
import pytest

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, seed_key
from distrl.ops.substitution import substituted

NUM_ITEMS = 8
POOLS = Ragged.of([[], *([10 * item, 10 * item + 1, 10 * item + 2] for item in range(1, 9))])
"""Every item has three near ones, which no other item has."""
EACH = {"draw": "each", "share": 0.2, "most": 3}
SHARE = {"draw": "share", "share": 0.2, "most": 3}


def keys_of(count, seed=3):
    return mixed(np.repeat(seed_key(seed), count), np.arange(count))


def lists(sequences):
    pairs = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [sequences.values[start:stop].tolist() for start, stop in pairs]


def rows_of(length, count):
    return Ragged.of(
        [[1 + (row + place) % NUM_ITEMS for place in range(length)] for row in range(count)]
    )


def five_deviations(chance, count):
    return 5 * (chance * (1 - chance) / count) ** 0.5


@pytest.mark.parametrize(
    ("length", "replaced"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3), (50, 10)]
)
def test_share_replaces_the_floor_of_the_share_but_one_at_least(length, replaced):
    rows = rows_of(length, 200)
    changed = substituted(rows, keys_of(200), POOLS, **SHARE).values != rows.values
    assert (changed.reshape(200, length).sum(axis=1) == replaced).all()


def test_share_is_exact_where_floats_are_not():
    # (1 - 0.9) * 3 * 10 is a little less than 3 in floats.
    rows = rows_of(10, 50)
    found = substituted(rows, keys_of(50), POOLS, draw="share", share=(1 - 0.9) * 3, most=3)
    assert ((found.values != rows.values).reshape(50, 10).sum(axis=1) == 3).all()


def test_share_replaces_every_place_as_often():
    rows = rows_of(10, 20_000)
    changed = substituted(rows, keys_of(20_000), POOLS, **SHARE).values != rows.values
    of_place = changed.reshape(-1, 10).mean(axis=0)
    np.testing.assert_allclose(of_place, 0.2, atol=five_deviations(0.2, 20_000))


def test_each_item_is_replaced_with_the_probability_of_the_share_apart_from_the_others():
    rows = rows_of(10, 20_000)
    changed = substituted(rows, keys_of(20_000), POOLS, **EACH).values != rows.values
    changed = changed.reshape(-1, 10)
    np.testing.assert_allclose(changed.mean(axis=0), 0.2, atol=five_deviations(0.2, 20_000))
    # The number in a row is binomial, so that a row may stay whole, and neighbors know nothing.
    none = 0.8**10
    assert (~changed.any(axis=1)).mean() == pytest.approx(none, abs=five_deviations(none, 20_000))
    both = (changed[:, 1:] & changed[:, :-1]).mean(axis=0)
    np.testing.assert_allclose(both, 0.04, atol=five_deviations(0.04, 20_000))


@pytest.mark.parametrize("settings", [EACH, SHARE], ids=["each", "share"])
@pytest.mark.parametrize("most", [1, 2, 3, 20])
def test_an_item_becomes_one_of_the_first_of_its_own_pool_each_as_often(settings, most):
    rows = rows_of(10, 10_000)
    found = substituted(rows, keys_of(10_000), POOLS, **{**settings, "most": most})
    changed = found.values != rows.values
    assert np.array_equal(found.values[changed] // 10, rows.values[changed])
    places, counts = np.unique(found.values[changed] % 10, return_counts=True)
    reached = min(most, 3)
    assert places.tolist() == list(range(reached))
    np.testing.assert_allclose(
        counts / changed.sum(), 1 / reached, atol=five_deviations(1 / reached, changed.sum())
    )


@pytest.mark.parametrize("settings", [EACH, SHARE], ids=["each", "share"])
def test_items_without_a_pool_and_padding_stay(settings):
    pools = Ragged.of([[], [], [20], []])
    rows = Ragged.of([[1, 2, 0, 3], [], [1], [2]])
    found = substituted(rows, keys_of(4), pools, **{**settings, "share": 1.0})
    assert lists(found) == [[1, 20, 0, 3], [], [1], [20]]


@pytest.mark.parametrize("settings", [EACH, SHARE], ids=["each", "share"])
def test_nothing_is_replaced_with_a_share_of_zero_or_without_rows(settings):
    rows = rows_of(7, 30)
    found = substituted(rows, keys_of(30), POOLS, **{**settings, "share": 0.0})
    assert lists(found) == lists(rows)
    assert lists(substituted(Ragged.of([]), keys_of(0), POOLS, **settings)) == []


@pytest.mark.parametrize("settings", [EACH, SHARE], ids=["each", "share"])
def test_a_rows_draws_are_its_keys_and_no_other_rows(settings):
    rows, keys = rows_of(12, 40), keys_of(40)
    before = rows.values.copy()
    whole = lists(substituted(rows, keys, POOLS, **settings))
    assert lists(substituted(rows, keys, POOLS, **settings)) == whole
    back = np.arange(40)[::-1]
    assert lists(substituted(rows.take(back), keys[back], POOLS, **settings)) == whole[::-1]
    assert lists(substituted(rows, keys_of(40, seed=4), POOLS, **settings)) != whole
    assert np.array_equal(rows.values, before)
