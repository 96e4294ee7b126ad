import json

import pytest

from distrl.data.item_lines import item_lines
from distrl.errors import SchemaError, StorageError


def test_lines_keep_their_numbers_and_ids_become_text(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"item": 7, "title": "a"}\n\n  \n{"item": "x"}')
    lines = [tuple(line) for line in item_lines(str(path), "uri")]
    assert lines == [(1, "7", {"item": 7, "title": "a"}), (4, "x", {"item": "x"})]


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b'{"id": 1}', b'{"item": 1.5}', b'{"item": true}', b"\xff\xfe", b"[" * 9999],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line):
    path = tmp_path / "items.jsonl"
    path.write_bytes(json.dumps({"item": 1}).encode() + b"\n" + line)
    said = r"texts=.*items.jsonl: line 2 is no JSON object with .* as 'item'"
    with pytest.raises(SchemaError, match=said):
        list(item_lines(str(path), "texts"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"none\.jsonl: it does not exist"):
        list(item_lines(f"{tmp_path}/none.jsonl", "texts"))
