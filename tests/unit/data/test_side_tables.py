"""Tables beside a store: written part by part, whole or absent."""

import weakref

import pyarrow as pa
import pytest

from distrl.data.side_tables import (
    SideManifest,
    check_part_sizes,
    clear_table,
    find_table,
    part_path,
    read_part,
    write_manifest,
    write_part,
    write_parts,
)
from distrl.errors import ConfigError, SchemaError, StorageError

SCHEMA = pa.schema([("item_id", pa.int32()), ("vector", pa.list_(pa.float32(), 2))])
PATH = part_path("embeddings", "near", "items", 0)


def group(*ids):
    vectors = [[float(i), -float(i)] for i in ids]
    return pa.table({"item_id": list(ids), "vector": vectors}).cast(SCHEMA)


@pytest.fixture
def table(tmp_path):
    part = write_part(str(tmp_path), PATH, (group(*ids) for ids in ((1, 2), (), (3,))), SCHEMA)
    made = SideManifest(
        kind="embeddings",
        store_hash="of the store",
        made_with={},
        windows="none",
        max_len=5,
        dimension=2,
        items=(part,),
    )
    write_manifest(str(tmp_path), "near", made)
    return tmp_path, made


def test_each_table_is_a_row_group_an_empty_one_too(table):
    folder, made = table
    file = read_part(str(folder), made.items[0])
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert (sizes, made.items[0].rows) == ([2, 0, 1], 3)
    assert file.read_row_group(2).to_pydict() == {"item_id": [3], "vector": [[3.0, -3.0]]}
    assert made.items[0].bytes == (folder / PATH).stat().st_size
    assert [path.name for path in (folder / PATH).parent.iterdir()] == ["part-00000.parquet"]


def test_parts_are_written_side_by_side_and_no_row_group_stays_in_memory(tmp_path):
    given = []

    def groups():
        for number in range(4):
            assert [table() for pair in given for table in pair] == [None, None] * number
            pair = [group(number), group(number, number)]
            given.append([weakref.ref(table) for table in pair])
            yield [pair.pop(0), pair.pop(0)]

    other = part_path("embeddings", "near", "items", 1)
    parts = write_parts(str(tmp_path), {PATH: SCHEMA, other: SCHEMA}, groups())
    assert [(part.path, part.rows) for part in parts] == [(PATH, 4), (other, 8)]
    read = [read_part(str(tmp_path), part).read_row_group(3) for part in parts]
    assert [table.column("item_id").to_pylist() for table in read] == [[3], [3, 3]]


def test_what_changed_on_disk_is_named(table):
    folder, made = table
    check_part_sizes(str(folder), "near", made)
    content = (folder / PATH).read_bytes()
    (folder / PATH).write_bytes(content[:-9] + b"x" + content[-8:])
    check_part_sizes(str(folder), "near", made)
    with pytest.raises(SchemaError, match=r"part-00000.parquet has sha256 .* its manifest says"):
        read_part(str(folder), made.items[0])
    (folder / PATH).write_bytes(content[:-9])
    with pytest.raises(SchemaError, match="bytes, its manifest"):
        check_part_sizes(str(folder), "near", made)
    (folder / PATH).unlink()
    with pytest.raises(SchemaError, match="has no bytes"):
        check_part_sizes(str(folder), "near", made)
    with pytest.raises(StorageError, match="does not exist"):
        read_part(str(folder), made.items[0])


def test_a_table_is_found_by_name_and_cleared_with_nothing_else(table):
    folder, made = table
    assert find_table(str(folder), "embeddings", "near") == made
    assert find_table(str(folder), "embeddings", "far") is None
    assert find_table(str(folder), "neighbors", "near") is None
    (folder / "embeddings/near/items/notes.txt").write_text("kept")
    clear_table(str(folder), "embeddings", "near")
    assert find_table(str(folder), "embeddings", "near") is None
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert left == ["notes.txt"]


def test_a_group_that_fails_leaves_no_part(tmp_path):
    def groups():
        yield group(1)
        raise ValueError("the second group cannot be made")

    with pytest.raises(ValueError, match="second group"):
        write_part(str(tmp_path), PATH, groups(), SCHEMA)
    assert not list(tmp_path.rglob("*"))


def test_a_row_group_that_nobody_could_read_is_refused_before_it_is_written(tmp_path):
    # Nulls take no memory, however many there are.
    wide = pa.FixedSizeListArray.from_arrays(pa.nulls(1 << 31), 1 << 30)
    unreadable = pa.table({"vector": wide})
    said = r"2 vectors of 1,073,741,824 numbers, 2,147,483,648 in all.*smaller row_group_rows"
    with pytest.raises(ConfigError, match=said):
        write_part(str(tmp_path), PATH, [unreadable], unreadable.schema)
    assert not list(tmp_path.rglob("*"))


def test_equal_content_has_an_equal_hash(table, tmp_path_factory):
    _, made = table
    again = tmp_path_factory.mktemp("again")
    part = write_part(str(again), PATH, [group(1, 2), group(), group(3)], SCHEMA)
    assert part == made.items[0]
    other = made.model_copy(update={"items": (part, part)})
    assert other.content_hash != made.content_hash
