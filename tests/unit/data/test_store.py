import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.data.store import (
    check_sizes,
    manifest_hash,
    one_place_for_all,
    read_item_ids,
    read_manifest,
    verify_shard,
    verify_store,
)
from distrl.data.store_writer import clear_parts, write_items, write_sequences
from distrl.errors import SchemaError, StorageError
from distrl.schema import Manifest


def sequences(*rows, times=False):
    """One row a user; user n has the items rows[n]."""
    table = {"user": list(range(len(rows))), "items": pa.array(rows, pa.list_(pa.int32()))}
    if times:
        table["timestamps"] = pa.array([[0] * len(row) for row in rows], pa.list_(pa.int64()))
    return pa.table(table)


@pytest.fixture
def store(tmp_path):
    uri = str(tmp_path / "store")
    shard = write_sequences(
        uri,
        0,
        [sequences([1], [1, 2, 3, 1], [2, 1, 3, 1, 2])],
        row_group_rows=2,
        row_group_bytes=99,
    )
    first = pa.table({"item_id": pa.array([1, 2], pa.int32()), "item": ["b", "a"], "count": [5, 3]})
    second = pa.table({"item_id": pa.array([3], pa.int32()), "item": ["c"], "count": [2]})
    manifest = Manifest(
        prepare={},
        prepare_hash="0",
        num_users=3,
        num_items=3,
        num_interactions=10,
        user_type="int64",
        item_type="string",
        has_timestamps=False,
        sequences=(shard,),
        items=(write_items(uri, 0, first), write_items(uri, 1, second)),
    )
    (tmp_path / "store/manifest.json").write_text(manifest.model_dump_json())
    return uri


def test_a_shard_counts_what_it_holds(store):
    (shard,) = read_manifest(store).sequences
    # Two items of each user are held out, and the first has nothing before it.
    assert (shard.rows, shard.tokens, shard.trainable_rows, shard.prefixes) == (3, 10, 2, 1 + 2)
    assert pq.ParquetFile(f"{store}/{shard.path}").metadata.num_row_groups == 2


def test_a_finished_store_is_whole(store):
    manifest = read_manifest(store)
    check_sizes(store, manifest)
    verify_store(store, manifest)
    assert read_item_ids(store, manifest).to_pylist() == ["b", "a", "c"]


def test_no_manifest_is_no_store(tmp_path):
    with pytest.raises(StorageError, match=r"has no manifest\.json: it is not a store, or"):
        read_manifest(str(tmp_path))


def test_a_manifest_of_another_version_is_refused(store):
    path = Path(store) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    with pytest.raises(SchemaError, match=r"manifest\.json is not a manifest: format_version"):
        read_manifest(store)


def test_a_missing_shard_is_named(store):
    manifest = read_manifest(store)
    (Path(store) / "items/part-00001.parquet").unlink()
    with pytest.raises(SchemaError, match=r"shard items/part-00001\.parquet is missing"):
        check_sizes(store, manifest)


def test_a_longer_shard_is_named_with_both_sizes(store):
    manifest = read_manifest(store)
    (shard,) = manifest.sequences
    with (Path(store) / shard.path).open("ab") as file:
        file.write(b"x")
    said = (
        f"sequences/part-00000.parquet has bytes {shard.bytes + 1}, the manifest says {shard.bytes}"
    )
    with pytest.raises(SchemaError, match=said):
        check_sizes(store, manifest)


def test_a_changed_byte_is_found_by_the_checksum_alone(store):
    manifest = read_manifest(store)
    (shard,) = manifest.sequences
    path = Path(store) / shard.path
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    check_sizes(store, manifest)
    with pytest.raises(SchemaError, match=f"has sha256 .*, the manifest says {shard.sha256}"):
        verify_shard(store, shard)


def test_a_row_count_that_is_not_the_files_is_named(store):
    (shard,) = read_manifest(store).sequences
    with pytest.raises(SchemaError, match="has rows 3, the manifest says 4"):
        verify_shard(store, shard.model_copy(update={"rows": 4}))


def test_items_out_of_order_are_refused(store):
    manifest = read_manifest(store)
    swapped = manifest.model_copy(update={"items": manifest.items[::-1]})
    with pytest.raises(SchemaError, match=r"does not number its items 1\.\.1 in order"):
        read_item_ids(store, swapped)


def test_the_hash_is_of_all_the_manifest_says(store):
    manifest = read_manifest(store)
    assert manifest_hash(manifest) == manifest_hash(read_manifest(store))
    assert manifest_hash(manifest) != manifest_hash(manifest.model_copy(update={"num_users": 4}))


@pytest.mark.parametrize("cuts", [[6], [1, 5], [2, 2, 2], [0, 3, 0, 3]])
def test_row_groups_do_not_depend_on_how_the_rows_arrive(tmp_path, cuts):
    whole = sequences([1] * 3, [2] * 50, [3], [4], [5], [6] * 2, times=True)
    tables, start = [], 0
    for rows in cuts:
        tables.append(whole.slice(start, rows))
        start += rows
    shard = write_sequences(str(tmp_path), 0, tables, row_group_rows=3, row_group_bytes=600)
    file = pq.ParquetFile(tmp_path / shard.path)
    # 12 bytes an interaction and 16 a user: the second user, with 616, fills a group alone.
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    assert sizes == [1, 1, 3, 1]
    assert file.read().equals(whole)
    one = write_sequences(str(tmp_path), 1, [whole], row_group_rows=3, row_group_bytes=600)
    assert shard.sha256 == one.sha256


def test_a_shard_without_users_is_no_file(tmp_path):
    assert write_sequences(str(tmp_path), 0, [], row_group_rows=3, row_group_bytes=600) is None
    empty = [sequences([1]).slice(0, 0)]
    assert write_sequences(str(tmp_path), 0, empty, row_group_rows=3, row_group_bytes=600) is None
    assert not (tmp_path / "sequences").exists()


def test_clearing_takes_only_the_files_that_prepare_writes(store):
    kept = Path(store) / "sequences/notes.txt"
    kept.write_text("mine")
    clear_parts(store)
    assert [path.name for path in sorted(Path(store).rglob("*")) if path.is_file()] == [
        "manifest.json",
        "notes.txt",
    ]


def test_what_nodes_wrote_elsewhere_is_named_as_that(store):
    manifest = read_manifest(store)
    with one_place_for_all(store):
        check_sizes(store, manifest)
    Path(store, manifest.sequences[0].path).unlink()
    said = rf"store_uri={store} must be one place for all nodes: .*{manifest.sequences[0].path}"
    with pytest.raises(StorageError, match=said), one_place_for_all(store):
        check_sizes(store, manifest)
