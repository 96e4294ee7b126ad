import json

import pyarrow as pa
import pytest

from distrl.data.side_tables import SideManifest, part_path, write_part
from distrl.errors import SchemaError, StorageError
from distrl.semantics.item_texts import content_hash, texts_of_descriptions, texts_of_lines
from tests.store_factory import make_store


@pytest.fixture
def store(tmp_path):
    """Items item-1 to item-4."""
    manifest = make_store(tmp_path / "store", [[1, 2, 3, 4], [4, 3, 2, 1]])
    return str(tmp_path / "store"), manifest


def lines(tmp_path, *entries):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries))
    return str(path)


def test_texts_come_in_the_order_of_the_stores_ids(store, tmp_path):
    uri = lines(
        tmp_path,
        {"item": "item-3", "text": "third", "title": "not this"},
        {"item": "unheard of", "text": "x"},
        "",
        {"item": "item-1", "title": "first", "text": ""},
        {"item": "item-2", "text": "  "},
    )
    assert texts_of_lines(uri, *store).to_pylist() == ["first", None, "third", None]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{", "line 2 is no JSON object with a string or a whole number as 'item'"),
        ("[1]", "line 2 is no JSON object with a string or a whole number as 'item'"),
        ({"text": "a"}, "line 2 is no JSON object with a string or a whole number as 'item'"),
        (
            {"item": 1.5, "text": "a"},
            "line 2 is no JSON object with a string or a whole number as 'item'",
        ),
        ({"item": "item-2", "text": ["a"]}, "line 2: the text of 'item-2' is no string"),
        ({"item": "item-1", "text": "b"}, "item 'item-1' has more than one line"),
    ],
)
def test_a_wrong_line_is_named(store, tmp_path, entry, said):
    uri = lines(tmp_path, {"item": "item-1", "text": "a"}, entry)
    with pytest.raises(SchemaError) as caught:
        texts_of_lines(uri, *store)
    assert said in str(caught.value)


def test_a_missing_file_is_named(store, tmp_path):
    for read in (content_hash, lambda uri: texts_of_lines(uri, *store)):
        with pytest.raises(StorageError, match=r"nothing\.jsonl"):
            read(str(tmp_path / "nothing.jsonl"))


def descriptions(store_uri, manifest, ids, texts):
    schema = pa.schema([("item_id", pa.int32()), ("text", pa.string()), ("source", pa.string())])
    table = pa.table({"item_id": ids, "text": texts, "source": ["llm"] * len(ids)})
    path = part_path("descriptions", "d", "items", 0)
    part = write_part(store_uri, path, [table], schema)
    return SideManifest(
        kind="descriptions", store_hash="h", made_with={}, windows="none", max_len=2, items=(part,)
    )


def test_descriptions_come_in_the_order_of_the_stores_ids(store):
    uri, manifest = store
    table = descriptions(uri, manifest, [4, 1], ["fourth", "first"])
    found = texts_of_descriptions(table, uri, manifest).to_pylist()
    assert found == ["first", None, None, "fourth"]


@pytest.mark.parametrize("ids", [[1, 5], [0, 1], [2, 2]])
def test_descriptions_of_other_items_are_refused(store, ids):
    uri, manifest = store
    table = descriptions(uri, manifest, ids, ["a", "b"])
    with pytest.raises(SchemaError, match=r"not among 1\.\.4, once each"):
        texts_of_descriptions(table, uri, manifest)
