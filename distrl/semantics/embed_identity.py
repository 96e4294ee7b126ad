"""What decides the content of a table of embeddings, and whether what lies there has it."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from distrl import storage
from distrl.data.side_tables import SideManifest, find_table
from distrl.data.store import manifest_hash
from distrl.errors import ConfigError, SchemaError
from distrl.schema import Manifest
from distrl.semantics.embed_config import EmbedConfig
from distrl.semantics.embed_parts import key_of_part
from distrl.semantics.embedders import LoadedModel
from distrl.semantics.item_texts import content_hash


@dataclass(frozen=True, slots=True)
class Identity:
    """Equal identities, equal vectors, up to the rounding of another machine."""

    store_hash: str
    made_with: dict[str, Any]
    windows: dict[str, Any]
    """Which windows, as the manifest says it."""
    items_per_part: int

    @property
    def key(self) -> str:
        """sha256 in hex, for each part; that of a table divided otherwise differs too."""
        said = [self.store_hash, self.made_with, self.windows, self.items_per_part]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def identify(
    config: EmbedConfig, manifest: Manifest, model: LoadedModel, table: SideManifest | None
) -> Identity:
    """Reads what identifies texts; the model is identified already.

    Raises:
        StorageError: If the texts cannot be read.
    """
    texts: dict[str, str] = {}
    if config.item_text_uri is not None:
        texts = {"item_text_sha256": content_hash(config.item_text_uri)}
    elif table is not None:
        texts = {"descriptions": str(config.descriptions), "descriptions_hash": table.content_hash}
    made_with = {
        **config.content_settings(),
        "model": model.label,
        "weights_sha256": model.sha256,
        **texts,
    }
    windows = {
        "windows": config.windows.which,
        "held_out": config.windows.held_out,
        "max_len": config.max_len,
    }
    return Identity(manifest_hash(manifest), made_with, windows, config.items_per_part)


def find_descriptions(config: EmbedConfig, manifest: Manifest) -> SideManifest | None:
    """The table of descriptions that is asked for; None where none is.

    Raises:
        ConfigError: If there is no such table, or its windows are not those that are asked for.
        SchemaError: If it is of another store.
        StorageError: If the place cannot be read.
    """
    if config.descriptions is None:
        return None
    table = find_table(config.store_uri, "descriptions", config.descriptions)
    where = f"descriptions={config.descriptions}"
    if table is None:
        raise ConfigError(f"{where}: {config.store_uri} has no finished descriptions of that name")
    if table.store_hash != manifest_hash(manifest):
        raise SchemaError(
            f"{where}: they were made of another store than the one that is in {config.store_uri}"
        )
    if not table.items:
        raise ConfigError(f"{where}: the table describes no items")
    if config.windows.which != "none" and config.source == "descriptions":
        asked = (config.windows.which, config.windows.held_out, config.max_len)
        found = (table.windows, table.held_out, table.max_len)
        names = ("windows.which", "windows.held_out", "max_len")
        for name, was, wanted in zip(names, found, asked, strict=True):
            if was != wanted:
                raise ConfigError(f"{name}={wanted}, but {where} was made with {name}={was}")
    return table


def check_same(config: EmbedConfig, found: SideManifest, asked: Identity) -> None:
    """Refuses a finished table of this store that was made with other settings.

    Raises:
        ConfigError: Naming the first setting that differs.
    """
    was = {**found.made_with, **{name: getattr(found, name) for name in asked.windows}}
    now = {**asked.made_with, **asked.windows}
    for name in now:
        if was.get(name) != now[name]:
            raise ConfigError(
                f"{config.store_uri} already has embeddings {config.name} made with "
                f"{name}={was.get(name)}, not {now[name]}: --overwrite replaces them, another name "
                "keeps both"
            )


def check_unfinished(config: EmbedConfig, key: str) -> None:
    """Refuses to go on where a job with other settings was killed, whose parts would be lost.

    Raises:
        ConfigError: If there are such parts.
        StorageError: If the place cannot be read.
    """
    for folder in ("items", "windows"):
        place = storage.join(config.store_uri, "embeddings", config.name, folder)
        parts = [
            info.base_name
            for info in storage.listing(place)
            if info.base_name.startswith("part-") and info.base_name.endswith(".parquet")
        ]
        if parts and key_of_part(storage.join(place, parts[0])) != key:
            raise ConfigError(
                f"{place} holds {len(parts)} parts of an unfinished table that was made with other "
                "settings: --overwrite removes them, another name keeps them"
            )
