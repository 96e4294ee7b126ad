"""What is known of items, as JSON lines: one object a line, the caller's own id in one field."""

import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from distrl.errors import SchemaError
from distrl.storage import explained, filesystem


class ItemLine(NamedTuple):
    """One line."""

    number: int
    """From 1, blank lines counted."""
    item: str
    """The caller's own id."""
    record: dict[str, Any]


def item_lines(uri: str, setting: str, key: str = "item") -> Iterator[ItemLine]:
    """The lines of a file that are not blank, one in memory at a time; `.gz` and the like unpacked.

    Args:
        uri: Of the file.
        setting: What names the file in a config, for errors.
        key: The field with the id, a string or a whole number.

    Raises:
        SchemaError: If a line is no object with such a field.
        StorageError: If the file cannot be read.
    """
    fs, path = filesystem(uri)
    try:
        with fs.open_input_stream(path) as source, io.BufferedReader(source) as lines:  # pyright: ignore[reportArgumentType]
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parsed(line, number, uri, setting, key)
    except OSError as error:
        raise explained(uri, "read", error) from error


def _parsed(line: bytes, number: int, uri: str, setting: str, key: str) -> ItemLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also bytes that are no UTF-8
        record = None
    own = record.get(key) if isinstance(record, dict) else None
    if record is None or not isinstance(own, str | int) or isinstance(own, bool):
        raise SchemaError(
            f"{setting}={uri}: line {number} is no JSON object with a string or a whole number as "
            f"{key!r}"
        )
    return ItemLine(number, str(own), record)
