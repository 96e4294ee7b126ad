"""Raw events read as a stream of Arrow tables whose columns are named by their role.

Roles are user, item, timestamp, event_type and rating. A file that cannot be parsed is one
SchemaError that names the file and, in text, the line.
"""

from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from distrl import storage
from distrl.data.csv_events import read_csv
from distrl.data.event_columns import EventColumns, by_role, missing_column
from distrl.data.line_events import read_jsonl, read_sequences
from distrl.data.prepare_config import FileFormat
from distrl.data.source_files import ReadPart
from distrl.errors import SchemaError

_BATCH_ROWS = 1 << 18


def read_events(part: ReadPart, columns: EventColumns) -> Iterator[tuple[int, pa.Table]]:
    """Tables of a file's events in order, each with the number of its first row in the file.

    Rows are counted from 1, without a header line; for `sequences` a row is an interaction.

    Raises:
        SchemaError: If a column is missing or of the wrong type, or a row cannot be parsed.
        StorageError: If the file cannot be read.
    """
    if part.file.size == 0:
        return
    readers: dict[FileFormat, Callable[..., Iterator[pa.Table]]] = {
        "parquet": _read_parquet,
        "csv": read_csv,
        "tsv": read_csv,
        "jsonl": read_jsonl,
        "sequences": read_sequences,
    }
    row = part.first_row + 1
    try:
        for table in readers[columns.format](part, columns):
            yield row, table
            row += table.num_rows
    except OSError as error:
        raise storage.explained(part.file.uri, "read", error) from error


def _read_parquet(part: ReadPart, columns: EventColumns) -> Iterator[pa.Table]:
    with storage.open_input(part.file.uri) as opened:
        try:
            file = pq.ParquetFile(opened)
            there = file.schema_arrow.names
            for role, name in columns.names:
                if name not in there:
                    raise missing_column(part.file, name, role, there)
            for batch in file.iter_batches(
                batch_size=_BATCH_ROWS,
                row_groups=part.row_groups,
                columns=sorted({name for _, name in columns.names}),
            ):
                yield by_role(pa.Table.from_batches([batch]), columns)
        except pa.ArrowInvalid as error:
            raise SchemaError(f"{part.file.uri} is not a readable Parquet file: {error}") from error
