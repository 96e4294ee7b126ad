"""Events from CSV and TSV files."""

import csv
import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv as pacsv

from distrl.data.event_columns import (
    BLOCK_BYTES,
    NULLS,
    EventColumns,
    by_role,
    missing_column,
    open_text,
    text_problem,
)
from distrl.data.prepare_config import FileFormat
from distrl.data.source_files import ReadPart, SourceFile
from distrl.errors import SchemaError


def csv_rows(
    file: SourceFile, format_: FileFormat, header: Sequence[str] | None
) -> Iterator[dict[str, str | None]]:
    """Rows as text by column name, slowly; a field without a value is None.

    A file with a header line and no row yields one row of nothing but None, for its names.
    """
    with open_text(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
        rows = csv.reader(text, delimiter=_delimiter(format_))
        names = list(header or next(rows, []))
        empty = True
        for fields in rows:
            if fields:
                empty = False
                yield {
                    name: None if field in NULLS else field
                    for name, field in zip(names, fields, strict=False)
                }
        if empty:
            yield dict.fromkeys(names)


def _delimiter(format_: FileFormat) -> str:
    return "\t" if format_ == "tsv" else ","


def read_csv(part: ReadPart, columns: EventColumns) -> Iterator[pa.Table]:
    """Tables of a CSV or TSV file's events.

    Raises:
        SchemaError: If a column is missing, or a line does not parse.
    """
    with open_text(part.file) as stream:
        try:
            reader = pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(
                    block_size=BLOCK_BYTES, column_names=columns.header and list(columns.header)
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=_delimiter(columns.format), newlines_in_values=columns.format == "csv"
                ),
                convert_options=pacsv.ConvertOptions(
                    include_columns=sorted({name for _, name in columns.names}),
                    column_types={name: columns.text_type(role) for role, name in columns.names},
                    null_values=list(NULLS),
                    strings_can_be_null=True,
                ),
            )
            for batch in reader:
                yield by_role(pa.Table.from_batches([batch]), columns)
        except pa.ArrowKeyError as error:
            raise _csv_columns_missing(part.file, columns) from error
        except pa.ArrowInvalid as error:
            raise _locate_csv(part.file, columns, error) from error


def _csv_columns_missing(file: SourceFile, columns: EventColumns) -> SchemaError:
    with open_text(file) as stream:
        first = next(
            csv.reader(io.TextIOWrapper(stream, "utf-8-sig"), delimiter=_delimiter(columns.format)),
            [],
        )
    there = columns.header or first
    for role, name in columns.names:
        if name not in there:
            return missing_column(file, name, role, there)
    return SchemaError(f"{file.uri} has no usable header line: {','.join(first)}")


def _locate_csv(file: SourceFile, columns: EventColumns, error: Exception) -> SchemaError:
    """Reads again, slowly, for the line that Arrow could not parse and does not name."""
    with open_text(file) as stream:
        rows = csv.reader(
            io.TextIOWrapper(stream, "utf-8-sig", errors="strict", newline=""),
            delimiter=_delimiter(columns.format),
        )
        try:
            header = columns.header or next(rows, [])
            places = [(role, name, header.index(name)) for role, name in columns.names]
            for fields in rows:
                where = f"{file.uri} line {rows.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    return SchemaError(f"{where}: {len(fields)} fields, {len(header)} expected")
                for role, name, place in places:
                    problem = text_problem(fields[place], columns.text_type(role))
                    if problem:
                        return SchemaError(f"{where}: {name}={fields[place]!r} {problem}")
        except (csv.Error, UnicodeDecodeError) as found:
            return SchemaError(f"{file.uri} near line {rows.line_num + 1}: {found}")
    return SchemaError(f"{file.uri} cannot be parsed: {str(error).splitlines()[0]}")
