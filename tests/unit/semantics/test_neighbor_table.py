"""Rows of a table of neighbors, from shards drawn at random."""

import numpy as np
import pytest

from distrl.semantics import gathered
from distrl.semantics.embedded import WindowShard
from distrl.semantics.nearest import Pool
from distrl.semantics.neighbor_table import groups, total

SIZES, DIMENSION, K = (7, 0, 9, 5), 3, 4
STARTS = (0, 7, 7, 16)


def shard_of(number):
    """Windows whose vectors, users and items say which they are; row groups of two windows."""
    size, first = SIZES[number], STARTS[number]
    numbers = np.arange(first, first + size)
    vectors = np.stack([numbers, numbers * 2, np.full(size, number)], axis=1).astype(np.float16)
    held_out = numbers % 5 == 4
    shown = numbers % 3 + 1
    windows = WindowShard(
        users=numbers // 2,
        rows=np.arange(size, dtype=np.int32),
        lengths=(numbers + 1).astype(np.int32),
        held_out=held_out,
        group_starts=np.array([*range(0, size, 2), size]),
        items=np.concatenate([np.zeros(0), *(np.full(n % 3 + 1, n) for n in numbers)]).astype(
            np.int32
        ),
        offsets=np.concatenate([[0], np.cumsum(shown)]),
    )
    return Pool(vectors, numbers // 2, ~held_out), windows


def neighbors_of(number, seed=0):
    """Up to K other windows of each window, none of one that is held out."""
    rng = np.random.default_rng(seed)
    found = np.full((SIZES[number], K), -1)
    for row in range(SIZES[number]):
        if not shard_of(number)[1].held_out[row]:
            count = int(rng.integers(0, K + 1))
            found[row, :count] = rng.choice(sum(SIZES), count, replace=False)
    return found


@pytest.mark.parametrize("shard", range(len(SIZES)))
@pytest.mark.parametrize("rows_at_once", [1, 1 << 15])
def test_each_row_group_has_its_own_neighbors_and_shards_are_fetched_once(
    shard, rows_at_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(gathered, "_ROWS_AT_ONCE", rows_at_once)
    numbers, loaded = neighbors_of(shard), []

    def load(number):
        loaded.append(number)
        return shard_of(number)

    made = list(groups(shard, STARTS, numbers, load, tmp_path))
    assert loaded[0] == shard
    assert len(loaded[1:]) == len(set(loaded[1:]))
    held_out = shard_of(shard)[1].held_out
    assert len(made) == len(range(0, SIZES[shard], 2))
    for group, low in zip(made, range(0, SIZES[shard], 2), strict=True):
        rows = [row for row in range(low, min(low + 2, SIZES[shard])) if not held_out[row]]
        pool, windows = group.pool.to_pylist(), group.windows.to_pylist()
        wanted = sorted({int(n) for row in rows for n in numbers[row] if n >= 0})
        assert [row["window"] for row in pool] == wanted
        for row in pool:
            number = row["window"]
            assert (row["user"], row["length"]) == (number // 2, number + 1)
            assert row["items"] == [number] * (number % 3 + 1)
            assert list(map(float, row["vector"]))[:2] == [number, 2 * number]
        assert [row["row"] for row in windows] == rows
        for window in windows:
            found = [pool[place]["window"] for place in window["neighbors"]]
            assert found == [n for n in numbers[window["row"]] if n >= 0]
            assert float(window["vector"][0]) == STARTS[shard] + window["row"]
    counts = total([group.counts for group in made])
    assert counts.neighbors == (numbers >= 0).sum()
    assert counts.held_out == np.isin(numbers, np.arange(4, sum(SIZES), 5)).sum()
