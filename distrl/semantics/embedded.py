"""The vectors of a store, read a part at a time and checked against what they should be of."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float16, Int32, Int64

from distrl import storage
from distrl.data.ragged_columns import to_ragged
from distrl.data.side_tables import Part, SideManifest, read_part
from distrl.data.store import verify_shard
from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.ops.windows import Windows, window_items, windows_of
from distrl.schema import NUM_HELD_OUT, Shard
from distrl.semantics.nearest import Pool

_LARGEST_ERROR = 0.01
"""Of a norm in float16; more means that the vector is out of its range."""


class WindowShard(NamedTuple):
    """What there is to know of the windows of a sequence shard, besides their vectors."""

    users: Int64[np.ndarray, " windows"]
    """Rows of all shards before, and the row."""
    rows: Int32[np.ndarray, " windows"]
    lengths: Int32[np.ndarray, " windows"]
    held_out: Bool[np.ndarray, " windows"]
    """Whether it is an input of validation or test."""
    group_starts: Int64[np.ndarray, " groups1"]
    """Index of the first window of each row group of the shard, and their number."""
    items: Int32[np.ndarray, " tokens"]
    """Shown by the windows, oldest first, window after window."""
    offsets: Int64[np.ndarray, " windows1"]


def read_items(store_uri: str, table: SideManifest, part: Part, first: int) -> Pool:
    """Vectors of the items of one part, which are `first` and those that follow it.

    Raises:
        SchemaError: If the part does not hold that.
        StorageError: If it cannot be read.
    """
    file = read_part(store_uri, part)
    ids = _column(store_uri, part, file, "item_id")
    expected = np.arange(first, first + part.rows)
    if not np.array_equal(ids, expected):
        raise SchemaError(
            f"{store_uri}/{part.path} does not number its items {first}.."
            f"{first + part.rows - 1} in order; make the embeddings again with --overwrite"
        )
    vectors = _vectors(store_uri, part, file, table.dimension)
    return Pool(vectors, expected, np.any(vectors, axis=1))


def read_windows(
    store_uri: str,
    table: SideManifest,
    shard: int,
    sequences: Shard,
    rows_before: int,
    *,
    held_out: bool,
    exclude_same_user: bool,
) -> tuple[Pool, WindowShard]:
    """Vectors and content of the windows of one sequence shard.

    Args:
        store_uri: The store.
        table: Of its embeddings.
        shard: Number of the shard.
        sequences: The shard.
        rows_before: Rows of all shards before it.
        held_out: Keep the inputs of validation and test; nobody seeks their neighbors.
        exclude_same_user: Group windows by user; otherwise each is a group of its own.

    Raises:
        SchemaError: If the part is not of the shard's windows, or the shard is torn.
        StorageError: If a file cannot be read.
    """
    histories, starts = _sequences(store_uri, sequences)
    which = "last" if table.windows == "last" else "every"
    windows = windows_of(histories.lengths, which, held_out=table.held_out)
    part = table.window_parts[shard]
    file = read_part(store_uri, part)
    found = [_column(store_uri, part, file, name) for name in ("row", "length")]
    if not all(map(np.array_equal, found, windows)):
        raise SchemaError(
            f"{store_uri}/{part.path} does not hold the windows of {sequences.path}; make the "
            "embeddings again with --overwrite"
        )
    vectors = _vectors(store_uri, part, file, table.dimension)
    is_held_out = windows.length >= histories.lengths[windows.row] - NUM_HELD_OUT
    if not held_out and is_held_out.any():
        kept = ~is_held_out
        windows = Windows(windows.row[kept], windows.length[kept])
        vectors, is_held_out = vectors[kept], is_held_out[kept]
    users = rows_before + windows.row
    groups = users if exclude_same_user else (users << 32) | windows.length
    items = window_items(histories, windows, table.max_len)
    content = WindowShard(
        users,
        windows.row.astype(np.int32),
        windows.length.astype(np.int32),
        is_held_out,
        np.searchsorted(windows.row, starts),
        items.values.astype(np.int32),
        items.offsets,
    )
    return Pool(vectors, groups, np.any(vectors, axis=1) & ~is_held_out), content


def _sequences(store_uri: str, shard: Shard) -> tuple[Ragged, Int64[np.ndarray, " groups1"]]:
    """The histories of a shard, and the first row of each of its row groups and their number."""
    verify_shard(store_uri, shard)
    with storage.open_input(storage.join(store_uri, shard.path)) as source:
        file = pq.ParquetFile(source)
        counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        histories = to_ragged(file.read(columns=["items"]).column("items"))
    return histories, np.cumsum([0, *counts])


def _column(
    store_uri: str, part: Part, file: pq.ParquetFile, name: str
) -> Int64[np.ndarray, " rows"]:
    try:
        column = file.read(columns=[name]).column(name)
    except (KeyError, pa.ArrowException) as error:
        raise SchemaError(f"{store_uri}/{part.path} has no column {name}: {error}") from error
    if not pa.types.is_int32(column.type) or column.null_count:
        raise SchemaError(f"{store_uri}/{part.path}: {name} is {column.type}, or has gaps")
    return column.to_numpy().astype(np.int64)


def _vectors(
    store_uri: str, part: Part, file: pq.ParquetFile, dimension: int
) -> Float16[np.ndarray, "rows D"]:
    """All vectors of a part as float16, a row group in memory as what it was.

    Raises:
        SchemaError: If there are none, of another width, or beyond the range of float16.
    """
    where = f"{store_uri}/{part.path}"
    expected = pa.list_(pa.float32(), dimension)
    schema = file.schema_arrow
    if "vector" not in schema.names or schema.field("vector").type != expected:
        raise SchemaError(f"{where} has no column vector of {expected}")
    vectors, row = np.empty((file.metadata.num_rows, dimension), np.float16), 0
    for group in range(file.num_row_groups):
        try:
            column = file.read_row_group(group, columns=["vector"]).column("vector")
        except pa.ArrowInvalid as error:
            # Arrow cannot read a list of fixed size back that is null.
            raise SchemaError(
                f"{where} has a row without a vector; a missing text is all zeros: {error}"
            ) from error
        for chunk in column.chunks:
            wide = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = wide.astype(np.float16)
                _check_range(where, wide, narrow)
            vectors[row : row + len(narrow)] = narrow
            row += len(narrow)
    return vectors


def _check_range(where: str, wide: np.ndarray, narrow: np.ndarray) -> None:
    norms = [np.linalg.norm(vectors.astype(np.float64), axis=1) for vectors in (wide, narrow)]
    # Not `>`: it is false for what is no number.
    bad = np.flatnonzero(~(np.abs(norms[1] - norms[0]) <= _LARGEST_ERROR * norms[0]))
    if len(bad):
        raise SchemaError(
            f"{where} has a vector of norm {norms[0][bad[0]]:.3g}, which float16 cannot hold: "
            "scale what the embedder gives to lengths near 1"
        )
