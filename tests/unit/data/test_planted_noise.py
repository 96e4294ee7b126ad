"""Noise in a store: where it goes, what it may be, and what stays."""

import numpy as np
import pyarrow as pa
import pytest

from distrl.data.planted_noise import with_noise

NUM_ITEMS = 50


def table(rows, hashes=None, times=True):
    columns = {
        "user": pa.array([f"u{n}" for n in range(len(rows))]),
        "items": pa.array(rows, pa.list_(pa.int32())),
    }
    if times:
        stamps = [[100 * n + place for place in range(len(row))] for n, row in enumerate(rows)]
        columns["timestamps"] = pa.array(stamps, pa.list_(pa.int64()))
    hashes = range(1, len(rows) + 1) if hashes is None else hashes
    return pa.table({**columns, "hash": pa.array(hashes, pa.uint64())})


ROWS = [[1 + (n + i) % 20 for i in range(2 + n % 9)] for n in range(60)]


def test_own_items_stay_in_order_and_the_held_out_end_stays_clean():
    noisy = with_noise(table(ROWS), 0.5, NUM_ITEMS, 0)
    planted = 0
    for n, (before, after) in enumerate(zip(ROWS, noisy.column("items").to_pylist(), strict=True)):
        head = set(before[:-2])
        inside = [item for item in after[:-2] if item in head]
        assert inside == before[:-2]
        assert after[-2:] == before[-2:]
        planted += len(after) - len(before)
        times = noisy.column("timestamps").to_pylist()[n]
        assert times == sorted(times)
        assert len(times) == len(after)
        own = [t for t, item in zip(times[:-2], after[:-2], strict=True) if item in head]
        assert [*own, *times[-2:]] == [100 * n + place for place in range(len(before))]
    heads = sum(len(row) - 2 for row in ROWS)
    assert planted == pytest.approx(0.5 * heads, rel=0.1)
    assert noisy.column("items").type == pa.list_(pa.int32())


def test_a_random_item_has_the_time_of_the_item_behind_it():
    noisy = with_noise(table([[1, 2, 3, 4]]), 1.0, NUM_ITEMS, 3)
    (items,), (times,) = (noisy.column(c).to_pylist() for c in ("items", "timestamps"))
    assert len(items) == 6
    for place, item in enumerate(items):
        if item not in (1, 2, 3, 4):
            assert times[place] == times[place + 1]


def test_the_draws_are_the_users_own():
    whole = with_noise(table(ROWS), 0.3, NUM_ITEMS, 0).column("items").to_pylist()
    order = np.random.default_rng(0).permutation(len(ROWS))
    mixed_up = table([ROWS[n] for n in order], [int(n) + 1 for n in order], times=False)
    again = with_noise(mixed_up, 0.3, NUM_ITEMS, 0).column("items").to_pylist()
    assert again == [whole[n] for n in order]
    assert with_noise(table(ROWS), 0.3, NUM_ITEMS, 1).column("items").to_pylist() != whole


def test_sequences_of_held_out_items_alone_stay():
    noisy = with_noise(table([[5, 6], [7]]), 0.9, NUM_ITEMS, 0)
    assert noisy.column("items").to_pylist() == [[5, 6], [7]]
