"""The correlated items of a store: files beside its own, written by `jobs/correlate.py`.

    <store>/correlated/part-*.parquet  item_id (int32), correlated (list<int32>, best first)
    <store>/correlated/manifest.json   written last, so the table is whole or absent

The manifest holds the hash of the store's own, so a table belongs to exactly one store.
"""

import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from distrl import storage
from distrl.data.config import DataConfig
from distrl.data.ragged_columns import lists_by_item, to_ragged
from distrl.data.store import manifest_hash
from distrl.errors import ConfigError, SchemaError
from distrl.ops.ragged import Ragged
from distrl.schema import MANIFEST_NAME, Config, Manifest, Shard

FOLDER = "correlated"
COMMAND = "python jobs/correlate.py configs/correlate.yaml"


class CorrelationManifest(Config):
    """What a table of correlated items holds."""

    format_version: Literal[1] = 1
    store_hash: str
    """sha256 in hex of all that the manifest of its store says."""
    num_correlated: PositiveInt
    """Most items of a list."""
    window: PositiveInt
    num_empty: NonNegativeInt
    """Items without any correlated one."""
    parts: tuple[Shard, ...]
    """Rows are items; each item of the store is in one part."""

    @property
    def content_hash(self) -> str:
        """sha256 in hex of what the parts hold."""
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()


def write_part(
    store_uri: str, part: int, items: Int64[np.ndarray, " items"], correlated: Ragged
) -> Shard:
    """Writes one part of the table.

    Args:
        store_uri: The store.
        part: Its number.
        items: Ids.
        correlated: A row for each of them.

    Raises:
        StorageError: If the place is forbidden, full or unreachable.
    """
    lists = pa.ListArray.from_arrays(
        pa.array(correlated.offsets.astype(np.int32)),
        pa.array(correlated.values.astype(np.int32)),
    )
    table = pa.table({"item_id": pa.array(items.astype(np.int32)), "correlated": lists})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    path = f"{FOLDER}/part-{part:05d}.parquet"
    storage.write_bytes(storage.join(store_uri, path), content)
    digest = hashlib.sha256(content).hexdigest()
    return Shard(path=path, rows=len(items), bytes=len(content), sha256=digest)


def write_manifest(store_uri: str, table: CorrelationManifest) -> None:
    """Makes the written parts a table.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    content = table.model_dump_json(indent=1).encode()
    storage.write_bytes(_manifest_uri(store_uri), content)


def clear_table(store_uri: str) -> None:
    """Removes the table, its manifest first, and nothing else.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    storage.delete(_manifest_uri(store_uri))
    for info in storage.listing(storage.join(store_uri, FOLDER)):
        if info.base_name.startswith("part-") and info.base_name.endswith(".parquet"):
            storage.delete(storage.join(store_uri, FOLDER, info.base_name))


def find_table(store_uri: str) -> CorrelationManifest | None:
    """The manifest of a store's table, of whatever store it was made; None where no table is.

    Raises:
        SchemaError: If the file is not such a manifest.
        StorageError: If the place cannot be read.
    """
    uri = _manifest_uri(store_uri)
    if not storage.exists(uri):
        return None
    try:
        return CorrelationManifest.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise SchemaError(
            f"{uri} is no manifest of correlated items: {where}: {problem['msg']}; "
            f"{_again(store_uri)}"
        ) from error


def check_table_sizes(store_uri: str, table: CorrelationManifest) -> None:
    """Compares the size of every part with the manifest: one listing.

    Raises:
        SchemaError: Naming the first part that is missing or has another size.
        StorageError: If the place cannot be listed.
    """
    listed = storage.listing(storage.join(store_uri, FOLDER))
    found = {f"{FOLDER}/{info.base_name}": info.size for info in listed}
    for part in table.parts:
        if found.get(part.path) != part.bytes:
            raise SchemaError(
                f"{store_uri}: {part.path} has {found.get(part.path, 'no')} bytes, its manifest "
                f"says {part.bytes}; {_again(store_uri)}"
            )


def check_substitutes(config: DataConfig, manifest: Manifest) -> CorrelationManifest | None:
    """Refuses what `read_substitutes` would refuse, by listings alone: for the driver.

    Returns:
        The manifest of the table, or None where no view is asked to substitute.

    Raises:
        ConfigError: If the store has no table, or lists shorter than what is asked for.
        SchemaError: If the table is of another store, or a part is missing or of another size.
        StorageError: If the place cannot be read.
    """
    augment, uri = config.augment, config.store_uri
    if "substitute" not in augment.operations:
        return None
    table = find_table(uri)
    if table is None:
        raise ConfigError(
            f"data.augment.operations has substitute, but {uri} has no table of correlated items; "
            f"make it: {COMMAND} store_uri={uri}"
        )
    if table.store_hash != manifest_hash(manifest):
        raise SchemaError(
            f"{uri}/{FOLDER} was made of another store than the one that is there; {_again(uri)}"
        )
    if augment.substitute_among > table.num_correlated:
        raise ConfigError(
            f"data.augment.substitute_among={augment.substitute_among}, but {uri} lists "
            f"{table.num_correlated} correlated items an item; {_again(uri)} "
            f"num_correlated={augment.substitute_among}"
        )
    check_table_sizes(uri, table)
    return table


def read_substitutes(config: DataConfig, manifest: Manifest) -> Ragged | None:
    """The first `substitute_among` correlated items of each item; row i is of item i, 0 of none.

    Takes 8 bytes for each of them and 8 an item.

    Returns:
        None where no view is asked to substitute.

    Raises:
        ConfigError: As `check_substitutes`.
        SchemaError: Also if a part has another checksum, or does not hold what it should.
        StorageError: If the table cannot be read.
    """
    table = check_substitutes(config, manifest)
    if table is None:
        return None
    parts = [_read_part(config.store_uri, part) for part in table.parts]
    rows = lists_by_item(parts, manifest.num_items, config.augment.substitute_among)
    if rows is None:
        raise SchemaError(
            f"{config.store_uri}/{FOLDER} does not hold the items 1..{manifest.num_items} once "
            f"each; {_again(config.store_uri)}"
        )
    return rows


def _read_part(store_uri: str, part: Shard) -> tuple[Int64[np.ndarray, " items"], Ragged]:
    """Ids and lists of one part, whose checksum is right."""
    uri = storage.join(store_uri, part.path)
    content = storage.read_bytes(uri)
    digest = hashlib.sha256(content).hexdigest()
    if digest != part.sha256:
        raise SchemaError(
            f"{uri} has sha256 {digest}, its manifest says {part.sha256}; {_again(store_uri)}"
        )
    table = pq.read_table(pa.BufferReader(content), columns=["item_id", "correlated"])
    return table.column("item_id").to_numpy().astype(np.int64), to_ragged(
        table.column("correlated")
    )


def _manifest_uri(store_uri: str) -> str:
    return storage.join(store_uri, FOLDER, MANIFEST_NAME)


def _again(store_uri: str) -> str:
    return f"make it again: {COMMAND} store_uri={store_uri} --overwrite"
