"""The page of examples: marks, names, and texts that are not what they should be."""

import json

import pytest

from distrl.data.store import read_manifest
from distrl.errors import SchemaError, StorageError
from distrl.train.examples import item_names, page
from tests.store_factory import make_store


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "store", [[1, 2, 3, 4], [2, 1, 4, 3]], num_items=4)
    return str(tmp_path / "store")


def test_the_page_marks_what_was_done():
    rows = {"histories": [[(1, "kept"), (2, "deleted"), (3, "inserted")]]}
    shown = page(rows, {1: "soap", 2: "*a*b ", 3: "x" * 70})
    assert "## Histories" in shown
    assert f"1. soap / ~~a b~~ / **+ {'x' * 60}...**" in shown


def test_items_have_the_callers_ids_where_they_have_no_text(store, tmp_path):
    manifest = read_manifest(store)
    own = item_names([1, 2, 5], store, manifest, None)
    assert set(own) == {1, 2}
    lines = [{"item": own[1], "title": "Soap"}, {"item": "other", "text": "no"}]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert item_names([1, 2], store, manifest, str(texts)) == {1: "Soap", 2: own[2]}


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"id": 3}'])
def test_a_line_that_names_no_item_is_told(store, tmp_path, line):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(f'{{"item": 1}}\n{line}\n')
    with pytest.raises(SchemaError, match=r"item_text_uri=.*line 2"):
        item_names([1], store, read_manifest(store), str(texts))


def test_texts_that_are_missing_are_told(store, tmp_path):
    with pytest.raises(StorageError, match=r"missing\.jsonl"):
        item_names([1], store, read_manifest(store), str(tmp_path / "missing.jsonl"))
