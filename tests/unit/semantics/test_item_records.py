import gzip
import json

import pytest

from distrl.data.store import read_manifest
from distrl.errors import SchemaError, StorageError
from distrl.semantics.describe_config import ItemTextsConfig
from distrl.semantics.item_records import read_item_records, rendered
from tests.store_factory import make_store


@pytest.fixture
def read(tmp_path):
    make_store(tmp_path / "store", [[1, 2, 3, 1]], num_shards=1)
    store = str(tmp_path / "store")

    def of(lines, name="items.jsonl", **settings):
        content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        packed = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
        (tmp_path / name).write_bytes(packed)
        config = ItemTextsConfig(uri=str(tmp_path / name), **settings)
        return read_item_records(config, "<$title>", store, read_manifest(store))

    return of


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a  b\nc", "a b c"),
        (["x", "", None, "y"], "x, y"),
        ([], "missing"),
        ({"Beauty": 12}, "Beauty 12"),
        (None, "missing"),
        ("", "missing"),
        (float("nan"), "missing"),
        (0, "0"),
        (9.5, "9.5"),
        ("z" * 30, "z" * 20),
        ("\ud83d", "?"),
    ],
)
def test_a_field_is_one_line_of_bounded_text(value, shown):
    assert rendered(value, 20) == shown


def test_lines_meet_items_by_the_logs_own_ids_in_any_order(read):
    records = read(
        [
            {"item": "item-3", "title": "C", "text": "c text"},
            {"item": "item-9", "title": "not in the store"},
            {"item": "item-1", "categories": ["A", "B"]},
        ],
        title=("title", "categories"),
    )
    assert records.show([1, 2, 3, 1]) == ["<A, B>", "<missing>", "<C>", "<A, B>"]
    assert records.num_missing == 1
    assert records.raw.to_pylist()[2] == "c text"


def test_compressed_lines_are_the_same_lines(read):
    lines = [{"item": f"item-{i}", "title": f"T{i}"} for i in (1, 2, 3)]
    packed = read(lines, "items.jsonl.gz")
    assert packed._replace(sha256="") == read(lines)._replace(sha256="")


def test_lines_of_other_items_alone_are_an_error_that_shows_both(read):
    with pytest.raises(SchemaError, match=r"its last item is 7, .* first item is item-1"):
        read([{"item": 7, "title": "T"}])
    with pytest.raises(SchemaError, match="its last item is nothing"):
        read([""])


def test_an_item_with_two_lines_is_an_error(read):
    with pytest.raises(SchemaError, match="item=item-2 has more than one line"):
        read([{"item": "item-2"}, {"item": "item-2"}])


@pytest.mark.parametrize("line", ["{", "[1]", '{"title": "T"}', '{"item": true}', '{"item": 1.5}',
                                  "[" * 100_000])  # fmt: skip
def test_a_line_that_is_no_record_is_named(read, line):
    with pytest.raises(SchemaError, match=r"line 2 is no JSON object with .* 'item'"):
        read([{"item": "item-1"}, line])


def test_a_missing_file_is_named(read, tmp_path):
    store = str(tmp_path / "store")
    config = ItemTextsConfig(uri=str(tmp_path / "gone.jsonl"))
    with pytest.raises(StorageError, match=r"gone\.jsonl: it does not exist"):
        read_item_records(config, "$title", store, read_manifest(store))
