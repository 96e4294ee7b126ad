import numpy as np
import pyarrow as pa
import pytest

from distrl.data.side_tables import find_table, part_path, write_part
from distrl.data.store import read_manifest
from distrl.errors import SchemaError
from distrl.semantics.embedded import read_items, read_windows
from tests.embeddings_factory import make_embeddings
from tests.store_factory import make_store

# Training windows: lengths 1 and 2 of the first, none of the second, 1 of the third.
SEQUENCES = [[1, 2, 3, 4, 5], [1, 2, 3], [5, 4, 3, 2]]
ITEMS = np.eye(5, 3)


def store_of(tmp_path, vector_of=lambda shard, row, length: [row + 1, length, 0], **settings):
    make_store(tmp_path, SEQUENCES, num_shards=1, row_group_rows=2)
    make_embeddings(str(tmp_path), ITEMS, vector_of, max_len=2, **settings)
    return str(tmp_path)


def windows_of(store, *, held_out=False, exclude_same_user=True):
    shard = read_manifest(store).sequences[0]
    return read_windows(
        store,
        find_table(store, "embeddings", "e"),
        0,
        shard,
        100,
        held_out=held_out,
        exclude_same_user=exclude_same_user,
    )


def test_windows_come_with_users_items_and_row_groups(tmp_path):
    pool, windows = windows_of(store_of(tmp_path))
    assert pool.vectors.tolist() == [[1, 1, 0], [1, 2, 0], [3, 1, 0]]
    assert pool.groups.tolist() == windows.users.tolist() == [100, 100, 102]
    assert pool.sought.tolist() == [True, True, True]
    assert windows.rows.tolist() == [0, 0, 2]
    assert windows.lengths.tolist() == [1, 2, 1]
    assert windows.group_starts.tolist() == [0, 2, 3]
    assert windows.items.tolist() == [1, 1, 2, 5]
    assert windows.offsets.tolist() == [0, 1, 3, 4]


def test_held_out_windows_are_dropped_unless_asked_for_and_never_sought(tmp_path):
    store = store_of(tmp_path, held_out=True)
    assert windows_of(store)[1].lengths.tolist() == [1, 2, 1]
    pool, windows = windows_of(store, held_out=True, exclude_same_user=False)
    assert windows.lengths.tolist() == [1, 2, 3, 4, 1, 2, 1, 2, 3]
    held_out = [length >= len(SEQUENCES[row]) - 2
                for row, length in zip(windows.rows, windows.lengths, strict=True)]  # fmt: skip
    assert windows.held_out.tolist() == held_out
    assert (pool.sought == ~windows.held_out).all()
    assert (np.diff(pool.groups) > 0).all()


def test_a_zero_vector_is_kept_and_not_sought(tmp_path):
    pool, windows = windows_of(store_of(tmp_path, lambda shard, row, length: [0, 0, length - 1]))
    assert pool.sought.tolist() == [False, True, False]
    assert len(windows.rows) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5, 1e-9])
def test_a_vector_beyond_float16_is_refused(tmp_path, value):
    store = store_of(tmp_path, lambda shard, row, length: [value, 0, 0])
    with pytest.raises(SchemaError, match=r"norm .* float16 cannot hold: scale"):
        windows_of(store)


def test_windows_of_other_sequences_are_refused(tmp_path):
    store = store_of(tmp_path, which="last")
    table = find_table(store, "embeddings", "e").model_copy(update={"windows": "every"})
    shard = read_manifest(store).sequences[0]
    with pytest.raises(SchemaError, match=r"does not hold the windows of sequences/part-00000"):
        read_windows(store, table, 0, shard, 0, held_out=False, exclude_same_user=True)


def test_items_are_numbered_in_order_and_a_zero_one_is_not_sought(tmp_path):
    store = store_of(tmp_path, num_parts=2)
    table = find_table(store, "embeddings", "e")
    pool = read_items(store, table, table.items[1], 4)
    assert pool.vectors.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert pool.groups.tolist() == [4, 5]
    assert not pool.sought.any()
    with pytest.raises(SchemaError, match=r"does not number its items 3\.\.4 in order"):
        read_items(store, table, table.items[1], 3)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2)), "no column vector of"),
        (pa.array([[1.0, 0.0, 0.0]], pa.list_(pa.float32())), "no column vector of"),
        (pa.array([None], pa.list_(pa.float32(), 3)), "a row without a vector"),
    ],
    ids=["width", "lists", "null"],
)
def test_vectors_of_another_form_are_refused(tmp_path, column, said):
    store = store_of(tmp_path)
    rows = pa.table({"item_id": pa.array([1], pa.int32()), "vector": column})
    part = write_part(store, part_path("embeddings", "e", "items", 0), [rows], rows.schema)
    with pytest.raises(SchemaError, match=said):
        read_items(store, find_table(store, "embeddings", "e"), part, 1)
