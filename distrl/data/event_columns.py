"""Which columns of the raw events are read, and what their values must look like."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from distrl import storage
from distrl.data.prepare_config import FileFormat
from distrl.data.source_files import SourceFile
from distrl.errors import SchemaError

TimeKind = Literal["none", "number", "integer", "iso", "arrow"]

BLOCK_BYTES = 8 << 20
"""How much of a text file is parsed at a time."""
NULLS = ("", "null", "NULL", "\\N")
"""Fields of CSV and TSV files that hold no value."""

_TIME_TYPES = {
    "number": pa.float64(),
    "integer": pa.int64(),
    "iso": pa.string(),
}


@dataclass(frozen=True, slots=True)
class EventColumns:
    """What to read, the same for every file of a source."""

    format: FileFormat
    names: tuple[tuple[str, str], ...]
    """Pairs of role and column name."""
    user_type: pa.DataType
    item_type: pa.DataType
    time: TimeKind
    """How the time column is written; `arrow` is whatever type a Parquet file has."""
    inflation: float
    """About how many bytes of events in memory a byte of a file becomes."""
    header: tuple[str, ...] | None = None
    """Column names of a CSV or TSV file that has no header line."""

    def text_type(self, role: str) -> pa.DataType:
        """The type that a role's column has in a text file."""
        if role == "user":
            return self.user_type
        if role == "item":
            return self.item_type
        if role == "timestamp":
            return _TIME_TYPES[self.time]
        return pa.float64() if role == "rating" else pa.string()


def missing_column(file: SourceFile, name: str, role: str, there: Sequence[str]) -> SchemaError:
    """The error for a column that a file does not have."""
    return SchemaError(
        f"{file.uri} has no column {name!r} (source.{role}); it has {', '.join(there) or 'none'}"
    )


def by_role(table: pa.Table, columns: EventColumns) -> pa.Table:
    """A table with its columns named by their roles."""
    return pa.table({role: table.column(name) for role, name in columns.names})


def open_text(file: SourceFile) -> pa.NativeFile:
    """A text file as a stream, unpacked where its name says that it is compressed."""
    fs, path = storage.filesystem(file.uri)
    return fs.open_input_stream(path)


def text_problem(value: str, type_: pa.DataType) -> str | None:
    """Why a field of a text file is not a value of a type; None if it is."""
    if value in NULLS or pa.types.is_string(type_):
        return None
    if pa.types.is_integer(type_):
        fits = re.fullmatch(r"\s*-?\d+\s*", value) and -(2**63) <= int(value) < 2**63
        return None if fits else "is not a 64-bit integer, which the first rows are"
    try:
        float(value)
    except ValueError:
        return "is not a number, which the first rows are"
    return None
