import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.errors import SchemaError, StorageError
from distrl.schema import Shard
from distrl.train.reading import ragged, shard_batches
from tests.store_factory import make_store


def test_a_shard_comes_in_bounded_batches_across_row_groups(tmp_path):
    sequences = [[1] * (user % 4 + 1) for user in range(25)]
    manifest = make_store(tmp_path / "store", sequences, num_shards=1, row_group_rows=7)
    batches = list(shard_batches(str(tmp_path / "store"), manifest.sequences[0], 10, ["items"]))

    assert max(batch.num_rows for batch in batches) <= 10
    lengths = [n for batch in batches for n in ragged(batch.column("items")).lengths.tolist()]
    assert lengths == [len(sequence) for sequence in sequences]


def test_a_slice_of_a_list_column_is_ragged_from_its_own_start():
    items = pa.array([[1, 2], [3], [], [4, 5, 6]], pa.list_(pa.int32())).slice(1, 3)
    rows = ragged(items)
    assert rows.values.tolist() == [3, 4, 5, 6]
    assert rows.offsets.tolist() == [0, 1, 1, 4]


def shard(path, rows):
    return Shard(path=path, rows=rows, bytes=1, sha256="")


def test_a_missing_column_is_named_beside_those_that_there_are(tmp_path):
    pq.write_table(pa.table({"user": [1], "item": [2]}), tmp_path / "part.parquet")
    with pytest.raises(SchemaError, match="has no column items; it has user, item"):
        next(shard_batches(str(tmp_path), shard("part.parquet", 1), 10, ["items"]))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"gone\.parquet: it does not exist"):
        next(shard_batches(str(tmp_path), shard("gone.parquet", 1), 10, ["items"]))


def test_a_damaged_page_is_no_outage(tmp_path):
    manifest = make_store(tmp_path / "store", [list(range(1, 40))] * 50, num_shards=1)
    path = tmp_path / "store" / manifest.sequences[0].path
    content = path.read_bytes()

    def flipped(at):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            pq.read_table(path, columns=["items"])
        except pa.ArrowInvalid:
            return False
        except OSError:
            return True
        return False

    assert any(flipped(at) for at in range(4, len(content) // 2)), "no flip is an OSError to Arrow"
    with pytest.raises(SchemaError, match="sha256"):
        list(shard_batches(str(tmp_path / "store"), manifest.sequences[0], 10, ["items"]))
