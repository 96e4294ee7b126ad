"""What a source's columns hold, learned from its first rows before any work starts."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq

from distrl import storage
from distrl.data.csv_events import csv_rows
from distrl.data.event_columns import EventColumns, TimeKind, missing_column
from distrl.data.line_events import text_blocks
from distrl.data.prepare_config import FileFormat, IdType, SourceConfig
from distrl.data.source_files import SourceFile, is_packed
from distrl.errors import SchemaError

_SAMPLE_ROWS = 2000
# Leading zeros mean something to whoever wrote them, so such ids are strings.
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")

# Bytes in memory for a byte of text; Parquet says how many rows it has.
_INFLATION: dict[FileFormat, float] = {"csv": 1.0, "tsv": 1.0, "jsonl": 0.5, "sequences": 4.0}
_PACKED_INFLATION = 4.0
_INTEGER_BYTES, _STRING_BYTES = 8, 32

Sample = Mapping[str, Sequence[object]]


def learn_columns(
    source: SourceConfig, files: Sequence[SourceFile], format_: FileFormat
) -> EventColumns:
    """The columns to read and their types, from the first file that holds anything.

    Raises:
        SchemaError: If all files are empty, or a column is missing or of an unusable type.
        StorageError: If the file cannot be read.
    """
    file = next((file for file in files if file.size > 0), None)
    if file is None:
        raise SchemaError(f"source.uri={source.uri}: all {len(files)} files are empty")
    names = _names(source, format_)
    try:
        if format_ == "parquet":
            return _from_parquet(source, file, names)
        sample = _sample(source, file, format_, names)
    except OSError as error:
        raise storage.explained(file.uri, "read", error) from error
    time: TimeKind = "none"
    if "timestamp" in sample:
        time = _time_kind(sample["timestamp"], source, format_)
    return EventColumns(
        format=format_,
        names=names,
        user_type=_text_id_type(source.user_type, sample["user"], format_),
        item_type=_text_id_type(source.item_type, sample["item"], format_),
        time=time,
        inflation=_INFLATION[format_] * (_PACKED_INFLATION if is_packed(file) else 1.0),
        header=source.column_names,
    )


def _names(source: SourceConfig, format_: FileFormat) -> tuple[tuple[str, str], ...]:
    if format_ == "sequences":
        return (("user", "user"), ("item", "item"))
    roles = {
        "user": source.user,
        "item": source.item,
        "timestamp": source.timestamp,
        "event_type": source.event_type,
        "rating": source.rating,
    }
    return tuple((role, name) for role, name in roles.items() if name is not None)


def _from_parquet(
    source: SourceConfig, file: SourceFile, names: tuple[tuple[str, str], ...]
) -> EventColumns:
    with storage.open_input(file.uri) as opened:
        try:
            parquet = pq.ParquetFile(opened)
        except pa.ArrowInvalid as error:
            raise SchemaError(f"{file.uri} is not a readable Parquet file: {error}") from error
    schema = parquet.schema_arrow
    for role, name in names:
        if name not in schema.names:
            raise missing_column(file, name, role, schema.names)
    types = {role: schema.field(name).type for role, name in names}
    user_type = _arrow_id_type(source.user_type, types["user"], file, source.user)
    item_type = _arrow_id_type(source.item_type, types["item"], file, source.item)
    kept = [user_type, item_type, *([pa.int64()] if "timestamp" in types else [])]
    row_bytes = sum(
        _STRING_BYTES if pa.types.is_string(type_) else _INTEGER_BYTES for type_ in kept
    )
    return EventColumns(
        format="parquet",
        names=names,
        user_type=user_type,
        item_type=item_type,
        time="arrow" if "timestamp" in types else "none",
        inflation=parquet.metadata.num_rows * row_bytes / file.size,
    )


def _arrow_id_type(wanted: IdType, found: pa.DataType, file: SourceFile, name: str) -> pa.DataType:
    if wanted != "auto":
        return pa.int64() if wanted == "int64" else pa.string()
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_integer(found):
        return pa.int64()
    if pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_binary(found):
        return pa.string()
    raise SchemaError(f"{file.uri}: column {name} is {found}; ids are integers or strings")


def _text_id_type(wanted: IdType, values: Iterable[object], format_: FileFormat) -> pa.DataType:
    if wanted != "auto":
        return pa.int64() if wanted == "int64" else pa.string()
    present = [value for value in values if value is not None]
    if format_ == "jsonl":
        # JSON says itself what is a number and what is a string.
        integers = all(type(value) is int for value in present)
    else:
        integers = all(_INTEGER.fullmatch(str(value)) for value in present)
    return pa.int64() if present and integers else pa.string()


def _time_kind(values: Iterable[object], source: SourceConfig, format_: FileFormat) -> TimeKind:
    present = [value for value in values if value is not None]
    strings = format_ == "jsonl" and any(isinstance(value, str) for value in present)
    if not strings and all(_is_number(value) for value in present):
        # A double holds every integer below 2**53, which counts of nanoseconds exceed.
        return "integer" if source.timestamp_unit == "ns" else "number"
    for value in present:
        try:
            datetime.fromisoformat(str(value))
        except ValueError:
            raise SchemaError(
                f"source.timestamp={source.timestamp}: {value!r} is neither a number nor an "
                "ISO 8601 time such as 2014-07-01T12:00:00Z"
            ) from None
    return "iso"


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _sample(
    source: SourceConfig,
    file: SourceFile,
    format_: FileFormat,
    names: tuple[tuple[str, str], ...],
) -> Sample:
    """The first values of each role; a field without a value is None."""
    if format_ == "sequences":
        lines = next(text_blocks(file), (1, b""))[1].decode(errors="replace").splitlines()
        words = [line.split() for line in lines[:_SAMPLE_ROWS] if line.strip()]
        return {
            "user": [line[0] for line in words],
            "item": [word for line in words for word in line[1:]],
        }
    rows = (
        _json_sample(file) if format_ == "jsonl" else csv_rows(file, format_, source.column_names)
    )
    first = list(itertools.islice(rows, _SAMPLE_ROWS))
    there = list(dict.fromkeys(name for row in first for name in row))
    for role, name in names:
        if name not in there:
            raise missing_column(file, name, role, there)
    return {role: [row.get(name) for row in first] for role, name in names}


def _json_sample(file: SourceFile) -> Iterable[dict[str, object]]:
    for line, text in enumerate(next(text_blocks(file), (1, b""))[1].splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise SchemaError(f"{file.uri} line {line} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise SchemaError(f"{file.uri} line {line} is not a JSON object")
        yield row
