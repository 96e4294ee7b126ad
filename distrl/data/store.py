"""A finished sequence store: its manifest, its item ids, and the proofs that it is whole."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from distrl import storage
from distrl.errors import SchemaError, StorageError
from distrl.schema import MANIFEST_NAME, Manifest, Shard


def read_manifest(store_uri: str) -> Manifest:
    """The manifest of a finished store.

    Raises:
        StorageError: If the place cannot be read, or holds no manifest.
        SchemaError: If the manifest is not one, or of a version that is not understood.
    """
    uri = storage.join(store_uri, MANIFEST_NAME)
    if not storage.exists(uri):
        raise StorageError(
            f"{store_uri} has no {MANIFEST_NAME}: it is not a store, or its prepare did not finish"
        )
    try:
        return Manifest.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise SchemaError(f"{uri} is not a manifest: {where}: {problem['msg']}") from error


def manifest_hash(manifest: Manifest) -> str:
    """sha256 in hex of all that a manifest says: equal hashes, equal stores."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def check_sizes(store_uri: str, manifest: Manifest) -> None:
    """Compares the size of every file with the manifest: two listings, whatever the store's size.

    Raises:
        SchemaError: Naming the first shard that is missing or has another size.
        StorageError: If the place cannot be listed.
    """
    for folder in ("sequences", "items"):
        found = {
            f"{folder}/{info.base_name}": info.size
            for info in storage.listing(storage.join(store_uri, folder))
        }
        for shard in manifest.sequences if folder == "sequences" else manifest.items:
            _expect(store_uri, shard, "bytes", shard.bytes, found.get(shard.path))


@contextmanager
def one_place_for_all(store_uri: str) -> Iterator[None]:
    """Around a check of sizes on the driver: what nodes wrote and it does not see lies elsewhere.

    Raises:
        StorageError: If the check raises a SchemaError.
    """
    try:
        yield
    except SchemaError as error:
        raise StorageError(
            f"store_uri={store_uri} must be one place for all nodes: {error}"
        ) from error


def verify_shard(store_uri: str, shard: Shard) -> None:
    """Reads one file of a store in full and compares bytes, checksum and rows with its manifest.

    Raises:
        SchemaError: Naming the shard, what the manifest says and what was found.
        StorageError: If the file cannot be read.
    """
    uri = storage.join(store_uri, shard.path)
    with storage.open_input(uri) as file:
        digest, size = storage.digest(file)
        _expect(store_uri, shard, "bytes", shard.bytes, size)
        _expect(store_uri, shard, "sha256", shard.sha256, digest)
        try:
            rows = pq.ParquetFile(file).metadata.num_rows
        except pa.ArrowInvalid as error:
            raise SchemaError(f"{uri} is not a Parquet file: {error}") from error
    _expect(store_uri, shard, "rows", shard.rows, rows)


def verify_store(store_uri: str, manifest: Manifest) -> None:
    """Reads every file of a store in full; see `verify_shard`.

    Raises:
        SchemaError: Naming the first file that is not what the manifest says.
        StorageError: If a file cannot be read.
    """
    for shard in (*manifest.sequences, *manifest.items):
        verify_shard(store_uri, shard)


def read_item_ids(store_uri: str, manifest: Manifest) -> pa.Array:
    """The caller's own ids: index i holds that of dense item i + 1.

    Raises:
        SchemaError: If the parts do not number the items 1..num_items in order.
        StorageError: If a part cannot be read.
    """
    pieces, expected = [], 1
    for shard in manifest.items:
        uri = storage.join(store_uri, shard.path)
        with storage.open_input(uri) as file:
            table = pq.read_table(file, columns=["item_id", "item"])
        ids = table.column("item_id").to_numpy()
        last = expected + len(ids) - 1
        if len(ids) == 0 or ids[0] != expected or ids[-1] != last:
            raise SchemaError(f"{uri} does not number its items {expected}..{last} in order")
        pieces.extend(table.column("item").chunks)
        expected = last + 1
    if expected - 1 != manifest.num_items:
        raise SchemaError(
            f"{store_uri}: the manifest says {manifest.num_items} items, its parts hold "
            f"{expected - 1}"
        )
    return pa.concat_arrays(pieces)


def _expect(store_uri: str, shard: Shard, what: str, promised: object, found: object) -> None:
    if found is None:
        raise SchemaError(f"{store_uri}: shard {shard.path} is missing; the manifest promises it")
    if promised != found:
        raise SchemaError(
            f"{store_uri}: shard {shard.path} has {what} {found}, the manifest says {promised}: "
            "the file changed after the store was made; prepare it again with --overwrite"
        )
