"""The table of neighbors beside a store, as the stream reads it."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16, Int64

from distrl.data.config import DataConfig
from distrl.data.found import Found
from distrl.data.ragged_columns import lists_by_item, to_ragged
from distrl.data.side_tables import Part, SideManifest, check_part_sizes, find_table, read_part
from distrl.data.store import manifest_hash
from distrl.errors import ConfigError, SchemaError
from distrl.ops.ragged import Ragged
from distrl.schema import Manifest
from distrl.storage import explained, join, open_input

COMMAND = "python jobs/retrieve.py configs/retrieve/beauty.yaml"

_LENGTHS = 1 << 31
"""Above any length of a history."""


def check_neighbors(config: DataConfig, manifest: Manifest) -> SideManifest | None:
    """Refuses a table that the stream could not use, by listings alone: for the driver.

    Returns:
        The manifest of the table, or None where the config names none.

    Raises:
        ConfigError: If there is no such table, or it is not made for such samples.
        SchemaError: If it is of another store, or a part is missing or of another size.
        StorageError: If the place cannot be read.
    """
    if config.neighbors is None:
        return None
    uri, name = config.store_uri, config.neighbors
    table = find_table(uri, "neighbors", name)
    if table is None:
        raise ConfigError(
            f"data.neighbors={name}, but {uri} has no such table; make it: {COMMAND} "
            f"store_uri={uri} name={name}"
        )
    if table.store_hash != manifest_hash(manifest):
        raise SchemaError(
            f"{uri}/neighbors/{name} was made of another store than the one that is there; make it "
            "again with --overwrite"
        )
    if table.max_len != config.max_len:
        raise ConfigError(
            f"data.max_len={config.max_len}, but the windows of data.neighbors={name} show "
            f"{table.max_len} items; set data.max_len={table.max_len} or embed and retrieve again"
        )
    if config.num_neighbors > table.num_neighbors:
        raise ConfigError(
            f"data.num_neighbors={config.num_neighbors}, but neighbors/{name} lists "
            f"{table.num_neighbors}; retrieve again with num_neighbors={config.num_neighbors}"
        )
    _check_windows(config, table)
    check_part_sizes(uri, name, table)
    return table


def _check_windows(config: DataConfig, table: SideManifest) -> None:
    shorter = config.samples == "prefix" or config.contrasted_prefixes > 1
    if table.windows == "last" and shorter:
        asked = (
            "data.samples=prefix"
            if config.samples == "prefix"
            else f"data.contrasted_prefixes={config.contrasted_prefixes}"
        )
        raise ConfigError(
            f"{asked} contrasts shorter prefixes too, but neighbors/{config.neighbors} knows the "
            "last window of each user alone; embed with windows=every, or contrast one prefix"
        )


def read_near_items(config: DataConfig, manifest: Manifest, table: SideManifest) -> Ragged:
    """Items near each, the nearest first; row i is of item i, row 0 of none.

    `num_neighbors` at most; 8 bytes for each of them and 8 an item.

    Raises:
        SchemaError: If a part is torn or does not hold the store's items once each.
        StorageError: If it cannot be read.
    """
    parts = []
    for part in table.items:
        read = read_part(config.store_uri, part).read(columns=["item_id", "neighbors"])
        ids = read.column("item_id").to_numpy().astype(np.int64)
        parts.append((ids, to_ragged(read.column("neighbors"))))
    rows = lists_by_item(parts, manifest.num_items, config.num_neighbors)
    if rows is None:
        raise SchemaError(
            f"{config.store_uri}/neighbors/{config.neighbors} does not hold the items "
            f"1..{manifest.num_items} once each; make it again with --overwrite"
        )
    return rows


@dataclass(frozen=True, slots=True)
class NeighborGroup:
    """The windows of the users of one row group, and the pool of their neighbors."""

    place: str
    key: Int64[np.ndarray, " W"]
    """Row and length of each window in one number, rising."""
    own: Float16[np.ndarray, "W E"]
    neighbors: Ragged
    """Rows of the pool, a row a window."""
    window: Int64[np.ndarray, " pool"]
    user: Int64[np.ndarray, " pool"]
    length: Int64[np.ndarray, " pool"]
    items: Ragged
    vectors: Float16[np.ndarray, "pool E"]

    def of(self, row: Int64[np.ndarray, " P"], length: Int64[np.ndarray, " P"], most: int) -> Found:
        """The first `most` neighbors of some prefixes, by the shard's row and by length.

        Raises:
            SchemaError: If the table does not know one of them.
        """
        asked = row * _LENGTHS + length
        at = np.minimum(np.searchsorted(self.key, asked), max(len(self.key) - 1, 0))
        known = len(self.key) > 0 and np.array_equal(self.key[at], asked)
        if len(asked) and not known:
            raise SchemaError(
                f"{self.place} does not know all windows of its users; make it again with "
                "--overwrite"
            )
        counts = np.minimum(self.neighbors.lengths[at], most)
        pool = self.neighbors.pieces(self.neighbors.offsets[:-1][at], counts).values
        return Found(
            self.own[at],
            counts,
            self.window[pool],
            self.user[pool],
            self.length[pool],
            self.items.take(pool),
            self.vectors[pool],
        )


def verify_windows(store_uri: str, table: SideManifest, shard: int) -> None:
    """Reads what the table says of a shard in full and compares checksums with its manifest.

    Raises:
        SchemaError: If a part changed since it was written.
        StorageError: If it cannot be read.
    """
    for part in (table.window_parts[shard], table.pools[shard]):
        read_part(store_uri, part).close()


def read_group(store_uri: str, table: SideManifest, shard: int, group: int) -> NeighborGroup:
    """What the table says of the users of one row group of one shard.

    Raises:
        SchemaError: If a part is torn or not laid out as the shard is.
        StorageError: If it cannot be read.
    """
    part, pool = table.window_parts[shard], table.pools[shard]
    windows = _read_group(store_uri, part, group)
    found = _read_group(store_uri, pool, group)
    try:
        row, length = (windows.column(n).to_numpy().astype(np.int64) for n in ("row", "length"))
        return NeighborGroup(
            part.path,
            row * _LENGTHS + length,
            _vectors(windows, table.dimension),
            to_ragged(windows.column("neighbors")),
            found.column("window").to_numpy().astype(np.int64),
            found.column("user").to_numpy().astype(np.int64),
            found.column("length").to_numpy().astype(np.int64),
            to_ragged(found.column("items")),
            _vectors(found, table.dimension),
        )
    except (KeyError, ValueError) as error:
        raise SchemaError(
            f"{join(store_uri, part.path)} is no table of neighbors: {error}"
        ) from error


def _read_group(store_uri: str, part: Part, group: int) -> pa.Table:
    uri = join(store_uri, part.path)
    try:
        with open_input(uri) as source:
            if source.size() != part.bytes:
                raise SchemaError(
                    f"{uri} has {source.size()} bytes, its manifest says {part.bytes}; make it "
                    "again with --overwrite"
                )
            file = pq.ParquetFile(source)
            if group >= file.num_row_groups:
                raise SchemaError(
                    f"{uri} has {file.num_row_groups} row groups, too few for its shard; make it "
                    "again with --overwrite"
                )
            return file.read_row_group(group)
    except pa.ArrowException as error:
        first = str(error).splitlines()[0]
        raise SchemaError(f"{uri} is torn or no Parquet file: {first}") from error
    except OSError as error:
        raise explained(uri, "read", error) from error


def _vectors(table: pa.Table, dimension: int) -> Float16[np.ndarray, "rows E"]:
    flat = table.column("vector").combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, dimension)
