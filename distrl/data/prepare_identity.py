"""Whether a store is already what a config and its inputs would make."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distrl import storage
from distrl.data.prepare_config import PrepareConfig
from distrl.data.source_files import SourceFile, fingerprint
from distrl.data.store import check_sizes, read_manifest
from distrl.errors import ConfigError
from distrl.schema import MANIFEST_NAME, Manifest

_NAMED_DIFFERENCES = 8


def identity(config: PrepareConfig, files: Sequence[SourceFile]) -> dict[str, Any]:
    """All that decides the store's content: settings and inputs."""
    return {"config": config.decisive(), "inputs": fingerprint(files)}


def identity_hash(described: Mapping[str, Any]) -> str:
    """sha256 in hex of an identity."""
    decisive = {
        "config": described["config"],
        "inputs": described["inputs"]["sha256"],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def finished_store(store_uri: str, described: Mapping[str, Any]) -> Manifest | None:
    """The manifest of the store that is already there, if it is the one asked for.

    Returns:
        None where no store is.

    Raises:
        ConfigError: If the store was made with other settings or inputs; names what differs.
        SchemaError: If it is the one asked for, but its files are not what its manifest says.
        StorageError: If the place cannot be read.
    """
    if not storage.exists(storage.join(store_uri, MANIFEST_NAME)):
        return None
    manifest = read_manifest(store_uri)
    if manifest.prepare_hash == identity_hash(described):
        check_sizes(store_uri, manifest)
        return manifest
    differences = list(_differences(manifest.prepare, described))
    more = len(differences) - _NAMED_DIFFERENCES
    named = "; ".join(differences[:_NAMED_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    raise ConfigError(
        f"{store_uri} already holds a store made otherwise ({named}): give another store_uri, or "
        "--overwrite to replace it"
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    was, now = dict(_flat(old.get("config", {}))), dict(_flat(new["config"]))
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            yield f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
    before = {file["uri"]: file for file in old.get("inputs", {}).get("files", [])}
    after = {file["uri"]: file for file in new["inputs"]["files"]}
    for uri in sorted(before.keys() | after.keys()):
        if uri not in after:
            yield f"input {uri} is gone"
        elif uri not in before:
            yield f"input {uri} is new"
        elif before[uri] != after[uri]:
            yield f"input {uri} changed"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
