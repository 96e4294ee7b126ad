"""The files of a store: written as a stream, counted and hashed on the way."""

import hashlib
import io
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrl import storage
from distrl.schema import NUM_HELD_OUT, Shard

_BYTES_PER_ROW = 16


class _HashingFile(io.RawIOBase):
    """Passes what is written on, and remembers its length and checksum."""

    def __init__(self, target: pa.NativeFile) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:  # noqa: ANN001
        self._target.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)
        return len(content)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _write_parquet(uri: str, tables: Iterator[pa.Table]) -> tuple[int, str]:
    """Writes each table as a row group; returns the file's bytes and sha256.

    Raises:
        StorageError: If the place is forbidden, full or unreachable.
    """
    fs, path = storage.filesystem(uri)
    first = next(tables)
    try:
        if storage.is_local(uri):
            fs.create_dir(path.rpartition("/")[0], recursive=True)
        with fs.open_output_stream(path) as target:
            file = _HashingFile(target)
            with pq.ParquetWriter(
                pa.PythonFile(file, mode="w"), first.schema, compression="zstd"
            ) as writer:
                for table in (first, *tables):
                    writer.write_table(table.combine_chunks(), row_group_size=table.num_rows)
    except OSError as error:
        raise storage.explained(uri, "write", error) from error
    return file.num_bytes, file.sha256()


def write_sequences(
    store_uri: str,
    shard: int,
    tables: Iterable[pa.Table],
    *,
    row_group_rows: int,
    row_group_bytes: int,
) -> Shard | None:
    """Writes one sequence shard; None where no user falls into it, and no file.

    Row groups depend on the users alone, not on how they are spread over `tables`.

    Args:
        store_uri: The store.
        shard: Its number.
        tables: Of user, items and perhaps timestamps, in the order of the shard.
        row_group_rows: Most users in a row group.
        row_group_bytes: Most bytes in memory in a row group, unless one user has more.

    Raises:
        StorageError: If the place is forbidden, full or unreachable.
    """
    counts = dict.fromkeys(("rows", "tokens", "trainable_rows", "prefixes"), 0)
    groups = _row_groups(tables, row_group_rows, row_group_bytes)
    first = next(groups, None)
    if first is None:
        return None

    def counted() -> Iterator[pa.Table]:
        for table in _chain(first, groups):
            lengths = _lengths(table)
            targets = np.maximum(lengths - NUM_HELD_OUT - 1, 0)
            counts["rows"] += len(lengths)
            counts["tokens"] += int(lengths.sum())
            counts["trainable_rows"] += int((targets > 0).sum())
            counts["prefixes"] += int(targets.sum())
            yield table

    path = f"sequences/part-{shard:05d}.parquet"
    num_bytes, sha256 = _write_parquet(storage.join(store_uri, path), counted())
    return Shard(path=path, bytes=num_bytes, sha256=sha256, **counts)


def write_items(store_uri: str, part: int, table: pa.Table) -> Shard:
    """Writes one file of the item table: item_id, item and count.

    Raises:
        StorageError: If the place is forbidden, full or unreachable.
    """
    path = f"items/part-{part:05d}.parquet"
    num_bytes, sha256 = _write_parquet(storage.join(store_uri, path), iter([table]))
    return Shard(path=path, rows=table.num_rows, bytes=num_bytes, sha256=sha256)


def clear_parts(store_uri: str) -> None:
    """Removes the files that a prepare writes, and nothing else.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    for folder in ("sequences", "items"):
        for info in storage.listing(storage.join(store_uri, folder)):
            if info.base_name.startswith("part-") and info.base_name.endswith(".parquet"):
                storage.delete(storage.join(store_uri, folder, info.base_name))


def _chain(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def _lengths(table: pa.Table) -> np.ndarray:
    return np.concatenate(
        [np.diff(chunk.offsets.to_numpy()) for chunk in table.column("items").chunks]
        or [np.empty(0, np.int64)]
    )


def _row_groups(tables: Iterable[pa.Table], max_rows: int, max_bytes: int) -> Iterator[pa.Table]:
    """Cuts a stream of tables into row groups, wherever the tables begin and end."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) < max_rows and _bytes(held) < max_bytes:
            continue
        rest = pa.concat_tables(held)
        while (group := _next_group(rest, max_rows, max_bytes)) is not None:
            yield rest.slice(0, group)
            rest = rest.slice(group)
        held = [rest]
    rest = pa.concat_tables(held) if held else None
    if rest is not None and rest.num_rows:
        yield rest


def _bytes(tables: Iterable[pa.Table]) -> int:
    return int(sum(_row_bytes(table).sum() for table in tables))


def _row_bytes(table: pa.Table) -> np.ndarray:
    per_token = 12 if "timestamps" in table.column_names else 4
    return _lengths(table) * per_token + _BYTES_PER_ROW


def _next_group(table: pa.Table, max_rows: int, max_bytes: int) -> int | None:
    """Rows of the next group; None if more rows could still join it."""
    head = table.slice(0, max_rows)
    fitting = int(np.searchsorted(np.cumsum(_row_bytes(head)), max_bytes, side="right"))
    if fitting < head.num_rows:
        return max(fitting, 1)
    return max_rows if table.num_rows >= max_rows else None
