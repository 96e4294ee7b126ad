"""Tables that lie beside a store's own files and belong to exactly one store.

    <store>/<kind>/<name>/items/part-*.parquet     a row an item
    <store>/<kind>/<name>/windows/part-*.parquet   a row a window; part N is of sequence shard N
    <store>/<kind>/<name>/pool/part-*.parquet      neighbors only; part N is of sequence shard N
    <store>/<kind>/<name>/manifest.json            written last, so a table is whole or absent

Window parts are ascending by (row, length); `distrl.ops.windows` says what a window is. Columns:

    descriptions   items: item_id int32, text string, source string
                   windows: row int32, length int32, text string, source string
    embeddings     items: item_id int32, vector fixed_size_list<float32>
                   windows: row int32, length int32, vector fixed_size_list<float32>
    neighbors      items: item_id int32, neighbors list<int32> (item ids, nearest first)
                   windows: row int32, length int32, vector fixed_size_list<halffloat>,
                            neighbors list<int32> (row numbers within the pool's row group)
                   pool: window int64, user int64, length int32, items list<int32>,
                         vector fixed_size_list<halffloat>

`source` is what a text is made of. Row group G of a window part of `neighbors`, and of its pool
part, is of the users of row group G of the sequence shard. `window` numbers a window among all of
the store and `user` a user, so that equal windows of different pools can be recognized.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from distrl import storage
from distrl.errors import ConfigError, SchemaError
from distrl.schema import MANIFEST_NAME, Config

Kind = Literal["descriptions", "embeddings", "neighbors"]
Folder = Literal["items", "windows", "pool"]

_UNREADABLE = 1 << 31
"""Numbers in one row group of a column of lists: Arrow counts them in 32 bits when it reads them,
though it writes as many as it is given."""


class Part(Config):
    """One Parquet file of a side table."""

    path: str
    """Relative to the store, with forward slashes."""
    rows: NonNegativeInt
    bytes: PositiveInt
    sha256: str
    """Of the file, in hex."""


class SideManifest(Config):
    """What a side table holds."""

    format_version: Literal[1] = 1
    kind: Kind
    store_hash: str
    """sha256 in hex of all that the manifest of its store says."""
    made_with: dict[str, Any]
    """Settings that decide its content, without credentials."""
    windows: Literal["every", "last", "none"]
    held_out: bool = False
    """Whether the inputs of validation and test are among the windows."""
    max_len: PositiveInt
    """Items that a window shows at most."""
    dimension: NonNegativeInt = 0
    """Of vectors; 0 where there are none."""
    num_neighbors: NonNegativeInt = 0
    """Most neighbors of an item or a window; 0 where there are none."""
    items: tuple[Part, ...] = ()
    window_parts: tuple[Part, ...] = ()
    pools: tuple[Part, ...] = ()
    facts: dict[str, float | int | str] = Field(default_factory=dict)
    """What was counted or measured while it was made."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All files of the table."""
        return (*self.items, *self.window_parts, *self.pools)

    @property
    def content_hash(self) -> str:
        """sha256 in hex of what the parts hold."""
        digests = "".join(part.sha256 for part in self.parts)
        return hashlib.sha256(digests.encode()).hexdigest()


def part_path(kind: Kind, name: str, folder: Folder, part: int) -> str:
    """Of a part, relative to its store."""
    return f"{kind}/{name}/{folder}/part-{part:05d}.parquet"


def write_part(store_uri: str, path: str, groups: Iterable[pa.Table], schema: pa.Schema) -> Part:
    """Writes one part, each table as a row group of its own, an empty one too.

    Raises:
        DistrlError: As `write_parts`.
    """
    (part,) = write_parts(store_uri, {path: schema}, map(lambda table: (table,), groups))
    return part


def write_parts(
    store_uri: str, schemas: Mapping[str, pa.Schema], groups: Iterable[Sequence[pa.Table]]
) -> list[Part]:
    """Writes parts side by side, a row group of each at a time, an empty one too.

    Parts are made on this machine's disk, and copied when all are whole. Memory grows with the
    largest row group and not with a part: one is in it as it was given, and once more, encoded and
    compressed; what `groups` holds while it makes the next comes on top.

    Args:
        store_uri: The store.
        schemas: Of each part, by its path.
        groups: For each row group a table a part, in the order of `schemas`.

    Raises:
        ConfigError: If a row group has more numbers in its vectors than can be read back.
        StorageError: If the place is forbidden, full or unreachable.
    """
    with ExitStack() as kept:
        files = {
            path: kept.enter_context(
                tempfile.NamedTemporaryFile(prefix="distrl-part-", suffix=".parquet")
            )
            for path in schemas
        }
        with ExitStack() as written:
            writers = {
                path: written.enter_context(
                    pq.ParquetWriter(files[path].name, schema, compression="zstd")
                )
                for path, schema in schemas.items()
            }
            for tables in groups:
                _write_groups(writers, tables)
                # Otherwise they stay until the next row groups are made.
                del tables
        return [_stored(store_uri, path, file) for path, file in files.items()]


def _write_groups(writers: Mapping[str, pq.ParquetWriter], tables: Sequence[pa.Table]) -> None:
    for (path, writer), table in zip(writers.items(), tables, strict=True):
        _check_vectors(path, table)
        writer.write_table(table.cast(writer.schema), row_group_size=max(table.num_rows, 1))


def _stored(store_uri: str, path: str, file: Any) -> Part:  # noqa: ANN401
    rows = pq.read_metadata(file.name).num_rows
    digest, size = storage.digest(file.file)
    storage.write_file(storage.join(store_uri, path), file.name)
    return Part(path=path, rows=rows, bytes=size, sha256=digest)


def _check_vectors(path: str, table: pa.Table) -> None:
    for field in table.schema:
        if not pa.types.is_fixed_size_list(field.type):
            continue
        numbers = table.num_rows * field.type.list_size
        if numbers >= _UNREADABLE:
            raise ConfigError(
                f"a row group of {path} would have {table.num_rows:,} vectors of "
                f"{field.type.list_size:,} numbers, {numbers:,} in all, and from {_UNREADABLE:,} "
                "on none can be read back: prepare the store with a smaller row_group_rows, or "
                "lower items_per_part of jobs/embed.py if the part is of items"
            )


def write_manifest(store_uri: str, name: str, table: SideManifest) -> None:
    """Makes the written parts a table.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    content = table.model_dump_json(indent=1).encode()
    storage.write_bytes(_manifest_uri(store_uri, table.kind, name), content)


def clear_table(store_uri: str, kind: Kind, name: str) -> None:
    """Removes a table, its manifest first, and nothing else.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    storage.delete(_manifest_uri(store_uri, kind, name))
    for folder in ("items", "windows", "pool"):
        place = storage.join(store_uri, kind, name, folder)
        for info in storage.listing(place):
            if info.base_name.startswith("part-") and info.base_name.endswith(".parquet"):
                storage.delete(storage.join(place, info.base_name))


def find_table(store_uri: str, kind: Kind, name: str) -> SideManifest | None:
    """The manifest of a side table, of whatever store it was made; None where there is none.

    Raises:
        SchemaError: If the file is not such a manifest.
        StorageError: If the place cannot be read.
    """
    uri = _manifest_uri(store_uri, kind, name)
    if not storage.exists(uri):
        return None
    try:
        return SideManifest.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise SchemaError(
            f"{uri} is no manifest of {kind}: {where}: {problem['msg']}; make the table again with "
            "--overwrite"
        ) from error


def check_part_sizes(store_uri: str, name: str, table: SideManifest) -> None:
    """Compares the size of every part with the manifest: a listing a folder.

    Raises:
        SchemaError: Naming the first part that is missing or has another size.
        StorageError: If the place cannot be listed.
    """
    found: dict[str, int] = {}
    for folder in ("items", "windows", "pool"):
        for info in storage.listing(storage.join(store_uri, table.kind, name, folder)):
            found[f"{table.kind}/{name}/{folder}/{info.base_name}"] = info.size
    for part in table.parts:
        if found.get(part.path) != part.bytes:
            raise SchemaError(
                f"{store_uri}: {part.path} has {found.get(part.path, 'no')} bytes, its manifest "
                f"says {part.bytes}; make it again with --overwrite"
            )


def read_part(store_uri: str, part: Part) -> pq.ParquetFile:
    """One part, whose checksum is right, to be read a row group at a time or whole.

    Raises:
        SchemaError: If it has another checksum.
        StorageError: If it cannot be read.
    """
    uri = storage.join(store_uri, part.path)
    source = storage.open_input(uri)
    try:
        digest, _ = storage.digest(source)
    except OSError as error:
        raise storage.explained(uri, "read", error) from error
    if digest != part.sha256:
        raise SchemaError(
            f"{uri} has sha256 {digest}, its manifest says {part.sha256}; make it again with "
            "--overwrite"
        )
    return pq.ParquetFile(source)


def _manifest_uri(store_uri: str, kind: Kind, name: str) -> str:
    return storage.join(store_uri, kind, name, MANIFEST_NAME)
