import numpy as np
import pyarrow as pa
import pytest

from distrl.data import partitions
from distrl.data.id_hash import hash_ids, slot, slot_of
from distrl.data.partitions import (
    assemble,
    item_buckets,
    item_counts,
    newest,
    sequences_table,
    shrink,
    split_by_user,
)


def events(*rows):
    """Rows of (user, item, timestamp)."""
    users, items, times = zip(*rows, strict=True)
    return pa.table({"user": users, "item": items, "timestamp": pa.array(times, pa.int64())})


def histories(partition):
    """Each user's items, as a dict."""
    ends = np.cumsum(partition.lengths)
    items = partition.items.take(pa.array(partition.codes)).to_pylist()
    return {
        user: items[end - length : end]
        for user, end, length in zip(
            partition.users.to_pylist(), ends, partition.lengths, strict=True
        )
    }


def test_the_hash_of_a_string_is_fnv_1a_mixed():
    # FNV-1a of "a" and "foobar" as published; the mixing is one-to-one.
    published = np.array([0xAF63DC4C8601EC8C, 0x85944171F73967E8], np.uint64)
    as_integers = pa.array(published.view(np.int64))
    assert hash_ids(pa.array(["a", "foobar"]), 5).tolist() == hash_ids(as_integers, 5).tolist()


def test_a_slice_of_ids_hashes_as_the_whole():
    ids = pa.array(["b", "", "Zürich", "x" * 300, "a"])
    assert hash_ids(ids[2:], 1).tolist() == hash_ids(ids, 1).tolist()[2:]


def test_slots_are_equal_ranges_of_the_hash():
    hashes = hash_ids(pa.array(range(10_000)), 0)
    slots = slot(hashes, 7)
    assert (np.diff(slots[np.argsort(hashes)]) >= 0).all()
    # 10,000 users in 7 slots: each within 5 standard deviations (35) of the mean.
    assert np.abs(np.bincount(slots, minlength=7) - 10_000 / 7).max() < 5 * 35
    assert [slot_of(int(hashed), 7) for hashed in hashes[:100]] == slots[:100].tolist()


def test_a_seed_gives_another_order():
    ids = pa.array(range(100))
    assert np.argsort(hash_ids(ids, 0)).tolist() != np.argsort(hash_ids(ids, 1)).tolist()


@pytest.mark.parametrize("num_partitions", [1, 3, 50])
def test_a_split_keeps_users_whole_and_rows_in_order(num_partitions):
    table = events(*[(user % 9, number, 0) for number, user in enumerate(range(0, 200, 7))])
    parts = split_by_user(table, num_partitions, seed=2)
    assert len(parts) == num_partitions
    users = [set(part["user"].to_pylist()) for part in parts]
    assert sum(len(of_part) for of_part in users) == len(set().union(*users)) == 9
    assert all(part["item"].to_pylist() == sorted(part["item"].to_pylist()) for part in parts)


def test_time_orders_a_user_and_the_input_decides_ties():
    table = events((1, 10, 5), (2, 20, 1), (1, 11, 3), (1, 12, 5), (2, 21, 0), (1, 13, 5))
    more = events((1, 14, 4), (1, 15, 3))
    assert histories(assemble([table, more], "none", 0)) == {
        1: [11, 15, 14, 10, 12, 13],
        2: [21, 20],
    }


def test_times_too_far_apart_for_one_key_still_order():
    table = events((1, 10, 2**62), (2, 20, 7), (1, 11, -(2**61)), (2, 21, 6), (3, 30, 0))
    assert histories(assemble([table], "none", 0)) == {1: [11, 10], 2: [21, 20], 3: [30]}


def test_without_times_the_input_is_the_order():
    table = events((1, 10, 5), (2, 20, 1), (1, 11, 3)).drop_columns("timestamp")
    partition = assemble([table], "none", 0)
    assert histories(partition) == {1: [10, 11], 2: [20]}
    assert partition.times is None


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("none", [7, 8, 7, 9, 8]), ("first", [7, 8, 9]), ("last", [7, 9, 8])],
)
def test_a_repeated_pair_keeps_its_first_or_last_place(keep, expected):
    rows = [(1, 7, 0), (1, 8, 1), (1, 7, 2), (1, 9, 3), (1, 8, 4), (2, 7, 9)]
    partition = assemble([events(*rows)], keep, 0)
    assert histories(partition) == {1: expected, 2: [7]}
    assert len(partition.times) == partition.num_interactions == len(expected) + 1


@pytest.mark.parametrize(("most", "of_first"), [(1, ["z"]), (2, ["x", "z"]), (9, ["y", "x", "z"])])
def test_the_newest_of_each_user_stay(most, of_first):
    rows = [(1, "z", 9), (1, "x", 5), (1, "y", 3), (2, "y", 4)]
    partition = newest(assemble([events(*rows)], "none", 0), most)
    assert histories(partition) == {1: of_first, 2: ["y"]}
    assert sorted(partition.times) == sorted([4, *[3, 5, 9][-most:]])
    counts = pa.concat_tables(item_counts(partition, 1)).to_pydict()
    assert sum(counts["count"]) == partition.num_interactions == len(of_first) + 1


def test_users_of_one_hash_stay_apart_in_the_order_of_their_ids(monkeypatch):
    monkeypatch.setattr(partitions, "hash_ids", lambda ids, seed: np.zeros(len(ids), np.uint64))
    table = events(("b", 1, 1), ("a", 2, 3), ("b", 3, 0), ("a", 4, 2))
    partition = assemble([table], "none", 0)
    assert partition.users.to_pylist() == ["a", "b"]
    assert histories(partition) == {"a": [4, 2], "b": [3, 1]}


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_shrinking_drops_items_first_and_then_users(num_buckets):
    rows = [(1, "x", 0), (1, "y", 1), (1, "z", 2), (2, "y", 0), (2, "x", 1), (3, "x", 0)]
    partition = assemble([events(*rows)], "none", 0)
    rare = pa.array(["z", "not here", "y"])
    buckets = item_buckets(rare, num_buckets)
    removed = [rare.filter(pa.array(buckets == bucket)) for bucket in range(num_buckets)]
    assert histories(shrink(partition, removed, num_buckets, 1)) == {1: ["x"], 2: ["x"], 3: ["x"]}
    only_z = [part.filter(pa.compute.equal(part, "z")) for part in removed]
    smaller = shrink(partition, only_z, num_buckets, 2)
    assert histories(smaller) == {1: ["x", "y"], 2: ["y", "x"]}
    assert smaller.times.tolist() == [0, 1, 0, 1]
    counts = pa.concat_tables(item_counts(smaller, num_buckets)).sort_by("item").to_pydict()
    assert counts == {"item": ["x", "y"], "count": [2, 2]}


def test_everything_can_be_dropped():
    partition = assemble([events((1, "x", 0))], "none", 0)
    empty = shrink(partition, [pa.array(["x"])], 1, 1)
    assert (empty.num_interactions, len(empty.users)) == (0, 0)
    assert item_counts(empty, 1)[0].num_rows == 0


@pytest.mark.parametrize("num_buckets", [1, 4])
def test_sequences_hold_dense_ids_and_times(num_buckets):
    partition = assemble([events((1, "x", 5), (1, "y", 3), (2, "x", 4))], "none", 0)
    ids = pa.table({"item": ["x", "y"], "item_id": pa.array([1, 2], pa.int32())})
    buckets = item_buckets(ids["item"], num_buckets)
    tables = [ids.filter(pa.array(buckets == bucket)) for bucket in range(num_buckets)]
    table = sequences_table(partition, tables, num_buckets).drop_columns("hash")
    assert table.schema.field("items").type == pa.list_(pa.int32())
    rows = {row.pop("user"): row for row in table.to_pylist()}
    assert rows == {
        1: {"items": [2, 1], "timestamps": [3, 5]},
        2: {"items": [1], "timestamps": [4]},
    }
