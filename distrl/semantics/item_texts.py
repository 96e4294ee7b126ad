"""Texts of a store's items: from JSON lines, or from a table of descriptions."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrl.data.item_lines import ItemLine, item_lines
from distrl.data.side_tables import SideManifest, read_part
from distrl.data.store import read_item_ids
from distrl.errors import SchemaError
from distrl.schema import Manifest
from distrl.storage import digest, explained, open_input

_LINES_AT_ONCE = 65536


def content_hash(uri: str) -> str:
    """sha256 in hex of a file.

    Raises:
        StorageError: If it cannot be read.
    """
    try:
        with open_input(uri) as file:
            return digest(file)[0]
    except OSError as error:
        raise explained(uri, "read", error) from error


def texts_of_lines(uri: str, store_uri: str, manifest: Manifest) -> pa.Array:
    """The text of each item: index i holds that of item i + 1, null where there is none.

    A line has `item`, the caller's own id as a string or a whole number, and `text` or else
    `title`. Lines of items that are not in the store are passed over.

    Raises:
        SchemaError: If a line is no such object, or an item comes twice.
        StorageError: If the file or the store cannot be read.
    """
    own = read_item_ids(store_uri, manifest).cast(pa.string())
    places, texts = [], []
    for items, found in _blocks(uri):
        place = pc.call_function("index_in", [items], pc.SetLookupOptions(own, skip_nulls=True))
        known = place.is_valid()
        places.append(place.filter(known))
        texts.append(found.filter(known))
    at = pa.concat_arrays([pa.array([], pa.int32()), *places])
    twice = np.flatnonzero(np.bincount(at.to_numpy(), minlength=1) > 1)
    if len(twice):
        raise SchemaError(
            f"item_text_uri={uri}: item {own[twice[0]].as_py()!r} has more than one line"
        )
    given = pa.concat_arrays([pa.array([], pa.large_string()), *texts])
    lines = np.full(len(own), -1, dtype=np.int64)
    lines[at.to_numpy()] = np.arange(len(at))
    return _blank_as_null(given.take(pa.array(lines, mask=lines < 0)))


def texts_of_descriptions(table: SideManifest, store_uri: str, manifest: Manifest) -> pa.Array:
    """The description of each item: index i holds that of item i + 1, null where there is none.

    Raises:
        SchemaError: If a part has another checksum, or names an item that the store does not have.
        StorageError: If it cannot be read.
    """
    ids, texts = [np.empty(0, np.int64)], [pa.array([], pa.large_string())]
    for part in table.items:
        found = read_part(store_uri, part).read(columns=["item_id", "text"])
        ids.append(found.column("item_id").to_numpy().astype(np.int64))
        texts.extend(found.column("text").cast(pa.large_string()).chunks)
    at = np.concatenate(ids)
    if len(at) and (at.min() < 1 or at.max() > manifest.num_items or np.bincount(at).max() > 1):
        raise SchemaError(
            f"{store_uri}: the descriptions' items are not among 1..{manifest.num_items}, once each"
        )
    rows = np.full(manifest.num_items, -1, dtype=np.int64)
    rows[at - 1] = np.arange(len(at))
    return _blank_as_null(pa.concat_arrays(texts).take(pa.array(rows, mask=rows < 0)))


def _blank_as_null(texts: pa.Array) -> pa.Array:
    trimmed = pc.call_function("utf8_trim_whitespace", [texts])
    blank = pc.call_function("equal", [trimmed, ""])
    return pc.call_function("if_else", [blank, pa.scalar(None, texts.type), texts])


def _blocks(uri: str) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Own ids and texts, some lines at a time."""
    lines = item_lines(uri, "item_text_uri")
    while some := list(islice(lines, _LINES_AT_ONCE)):
        items = [line.item for line in some]
        texts = [_text(uri, line) for line in some]
        yield pa.array(items, pa.string()), pa.array(texts, pa.large_string())


def _text(uri: str, line: ItemLine) -> str | None:
    text = line.record.get("text") or line.record.get("title")
    if text is not None and not isinstance(text, str):
        raise SchemaError(
            f"item_text_uri={uri}: line {line.number}: the text of {line.item!r} is no string"
        )
    return text
