"""The nearest items and windows of a store by its embeddings, on Ray.

    embeddings -> [load] -> [index, recall] -> [search, some rows a task] -> [write] -> manifest

Vectors lie in Ray's object store as float16, one copy a node, and indexes do too; the driver holds
references and counts. Every task goes through all vectors and all indexes, a part or an index at a
time: one of these must fit into the object store of a node, and all of them should. What does not
fit is spilled and read again by every task. There are as many indexes as `vectors_per_index` asks
for. What a task finds is kept beside the table until that is whole (`distrl.semantics.searched`).

Source: SRA-CL (arXiv 2503.04162), 4.1 and its code. Here an item or a window never neighbors
itself, and item 0 nothing (the code trusts that rank 0 is the same row); windows of the same user
and inputs of validation and test are left out unless told otherwise (the code has both); vectors
are rounded to float16 first, which moves a cosine by some 2e-5 in 384 dimensions.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from distrl import storage
from distrl.data.side_tables import SideManifest, check_part_sizes, find_table
from distrl.data.store import check_sizes, manifest_hash, read_manifest
from distrl.errors import ConfigError, SchemaError
from distrl.schema import Manifest
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.semantics.retrieve_index import ROUNDED
from distrl.semantics.retrieve_stages import Retrieval, resolved

logger = logging.getLogger(__name__)


def retrieve(
    config: RetrieveConfig,
    *,
    overwrite: bool = False,
    connect: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = logger.info,
) -> SideManifest:
    """Makes the table of neighbors, or finds that it is already made.

    A table of another store that once lay in the place is replaced.

    Args:
        config: What to make of which vectors.
        overwrite: Replace a table made with other settings, or a torn one.
        connect: Connects to Ray, unless that is done; called when all that can be checked without
            Ray has been.
        say: Told of progress, a line at a time.

    Raises:
        ConfigError: If there are no embeddings, a table was made with other settings, or an index
            finds too few of the neighbors.
        SchemaError: If the store, its embeddings or a table that is there is torn.
        StorageError: If the store cannot be read or written.
    """
    manifest = read_manifest(config.store_uri)
    check_sizes(config.store_uri, manifest)
    table = _embeddings(config, manifest)
    made_with = _made_with(config, table)
    if not overwrite:
        there = _finished(config, manifest, made_with)
        if there is not None:
            say(f"{config.store_uri} already has neighbors/{config.table}: nothing to do")
            return there
    approximate = [found.index for found in resolved(config, table).values()] != ["exact"] * 2
    if approximate and importlib.util.find_spec("faiss") is None:
        raise ConfigError("index=ivf and hnsw need FAISS: pip install 'distrl[text]'")
    storage.check_writable(config.store_uri)
    connect()
    return Retrieval(config, manifest, table, made_with, say).run()


def _embeddings(config: RetrieveConfig, manifest: Manifest) -> SideManifest:
    """The manifest of the vectors, which fit the store and what is asked of them."""
    place = f"{config.store_uri}/embeddings/{config.embeddings}"
    table = find_table(config.store_uri, "embeddings", config.embeddings)
    if table is None:
        raise ConfigError(
            f"embeddings={config.embeddings}, but there is no finished {place}; make it: python "
            f"jobs/embed.py configs/embed/... store_uri={config.store_uri} name={config.embeddings}"
        )
    if table.store_hash != manifest_hash(manifest):
        raise SchemaError(
            f"{place} was made of another store than the one that is there; make it again with "
            "--overwrite"
        )
    if config.held_out and not table.held_out:
        raise ConfigError(
            f"held_out=true, but {place} has no vectors of the inputs of validation and test; "
            "embed again with windows.held_out=true"
        )
    num_items = sum(part.rows for part in table.items)
    if num_items != manifest.num_items:
        raise SchemaError(f"{place} has {num_items} items, its store {manifest.num_items}")
    expected = 0 if table.windows == "none" else len(manifest.sequences)
    if len(table.window_parts) != expected:
        raise SchemaError(
            f"{place} has {len(table.window_parts)} parts of windows, its store {expected} shards"
        )
    check_part_sizes(config.store_uri, config.embeddings, table)
    return table


def _made_with(config: RetrieveConfig, table: SideManifest) -> dict[str, Any]:
    how = resolved(config, table)
    return {
        "embeddings": config.embeddings,
        "embeddings_hash": table.content_hash,
        "num_neighbors": config.num_neighbors,
        "exclude_same_user": config.exclude_same_user,
        "held_out": config.held_out,
        "items": how["items"].knobs,
        "windows": how["windows"].knobs,
    }


def _finished(
    config: RetrieveConfig, manifest: Manifest, made_with: dict[str, Any]
) -> SideManifest | None:
    """The table that is there, if it is of this store."""
    there = find_table(config.store_uri, "neighbors", config.table)
    if there is None or there.store_hash != manifest_hash(manifest):
        return None
    for name, asked in made_with.items():
        was = there.made_with.get(name)
        if was != asked:
            raise ConfigError(
                f"{config.store_uri} already has neighbors/{config.table} made with {name}={was}, "
                f"not {asked}: --overwrite replaces it, name=... makes another"
            )
    for what in ("items", "windows"):
        recall = float(there.facts.get(f"{what}_recall", 1.0))
        if recall + ROUNDED < config.min_recall:
            raise ConfigError(
                f"{config.store_uri} already has neighbors/{config.table} with {recall} of the "
                f"nearest {what}, below min_recall={config.min_recall}: --overwrite replaces it"
            )
    check_part_sizes(config.store_uri, config.table, there)
    return there
