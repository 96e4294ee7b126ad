import numpy as np
import pytest

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import (
    _inserted,
    _known_items,
    _unknown_items,
    mixed,
    seed_key,
    with_random_items,
)


def keys_of(count, seed=3):
    return mixed(np.repeat(seed_key(seed), count), np.arange(count))


def lists(sequences):
    pairs = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [sequences.values[start:stop].tolist() for start, stop in pairs]


def test_unknown_items_are_counted_past_the_known_ones():
    known, counts = _known_items(Ragged.of([[3, 2, 3], [1, 5], []]))
    assert lists(known) == [[2, 3], [1, 5], []]
    assert counts.tolist() == [2, 2, 0]
    rows = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    choice = np.array([0, 1, 2, 0, 1, 2, 0, 4])
    assert _unknown_items(known, rows, choice).tolist() == [1, 4, 5, 2, 3, 4, 1, 5]


def test_items_go_in_front_of_the_item_that_their_gap_names():
    row, rows, gap = Ragged.of([[1, 2], [3]]), np.array([0, 0, 0, 1]), np.array([2, 0, 2, 1])
    found = _inserted(row, np.array([7, 8, 9, 6]), rows, gap)
    assert lists(found) == [[8, 1, 2, 7, 9], [3, 6]]


def test_the_mean_number_of_inserted_items_is_the_share_at_any_length():
    for length in (3, 8, 25):
        histories = Ragged.of([range(1, length + 1)] * 4000)
        noisy = with_random_items(histories, 50, 0.05, 100, keys_of(4000))
        added = noisy.lengths - length
        assert set(added.tolist()) <= {int(0.05 * length), int(0.05 * length) + 1}
        assert added.mean() == pytest.approx(0.05 * length, abs=0.03)


def test_noise_is_unknown_to_the_whole_history_and_the_oldest_leave():
    histories = Ragged.of([range(1, 31)] * 500)
    left = set()
    for after in lists(with_random_items(histories, 10, 0.3, 40, keys_of(500))):
        own = [item for item in after if item <= 30]
        assert len(after) == 10
        assert own == list(range(31 - len(own), 31))
        left.add(len(own))
    # Three go in; one that is among the oldest leaves again, and an own item stays for it.
    assert left == {7, 8, 9, 10}


def test_every_unknown_item_and_every_gap_is_as_likely():
    noisy = with_random_items(Ragged.of([[2, 4]] * 12000), 50, 0.5, 6, keys_of(12000))
    assert (noisy.lengths == 3).all()
    rows = noisy.values.reshape(-1, 3)
    noise = (rows != 2) & (rows != 4)
    assert (noise.sum(axis=1) == 1).all()
    items, counts = np.unique(rows[noise], return_counts=True)
    assert items.tolist() == [1, 3, 5, 6]
    np.testing.assert_allclose(counts, 3000, atol=200)
    np.testing.assert_allclose(noise.sum(axis=0), 4000, atol=200)


def test_noise_follows_the_key_and_not_the_batch():
    histories, keys = Ragged.of([[1, 2, 3, 4, 5, 6]] * 20), keys_of(20)
    whole = lists(with_random_items(histories, 50, 0.5, 50, keys))
    back = np.arange(20)[::-1]
    assert lists(with_random_items(histories.take(back), 50, 0.5, 50, keys[back])) == whole[::-1]
    assert lists(with_random_items(histories, 50, 0.5, 50, keys_of(20, seed=4))) != whole


def test_a_larger_share_never_puts_fewer_items_in():
    histories, keys = Ragged.of([range(1, 8)] * 300), keys_of(300)
    shares = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
    lengths = [with_random_items(histories, 50, share, 50, keys).lengths for share in shares]
    assert (np.diff(lengths, axis=0) >= 0).all()
    assert (lengths[0] == 7).all()


def test_who_has_met_every_item_and_who_has_met_none_stay_as_they_are():
    histories = Ragged.of([[1, 2, 3], []])
    assert lists(with_random_items(histories, 50, 1.0, 3, keys_of(2))) == [[1, 2, 3], []]
    assert lists(with_random_items(Ragged.of([]), 50, 0.3, 3, keys_of(0))) == []
