"""What a task found, kept beside the table in the making until that is whole.

    <store>/neighbors/<name>/found/<key>/<what>-<piece>-<low>-<high>.npz
    <store>/neighbors/<name>/found/<key>/<what>-index.json      what was measured of its index

A run that was killed is followed by one that searches only for what is missing. The key is of all
that decides what is found, so that nothing of other vectors or settings is ever taken over.
"""

import hashlib
import io
import json
import zipfile
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from distrl import storage

Facts = dict[str, float | int | str]


class Searched(NamedTuple):
    """What a task found."""

    num_queries: int
    num_repeated: int
    """Queries that an index gave too few for, and that were searched exactly."""
    taken_over: bool = False
    """Whether an earlier run had found it."""


def found_folder(store_uri: str, name: str) -> str:
    """Where all that was found for a table is kept."""
    return storage.join(store_uri, "neighbors", name, "found")


def found_key(store_hash: str, made_with: dict[str, Any]) -> str:
    """Of the vectors and of the settings that decide what is found."""
    content = json.dumps([store_hash, made_with], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def keep_search(uri: str, searched: Searched, numbers: Int64[np.ndarray, "rows K"]) -> None:
    """Writes what a task found, whole or not at all.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    content = io.BytesIO()
    counts = np.array([searched.num_queries, searched.num_repeated])
    np.savez_compressed(content, counts=counts, numbers=numbers)
    storage.write_bytes(uri, content.getvalue())


def kept_search(
    uri: str, shape: tuple[int, int]
) -> tuple[Searched, Int64[np.ndarray, "rows K"]] | None:
    """What an earlier run found, or None if there is nothing, or it is torn.

    Args:
        uri: Of the file.
        shape: Rows and K.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    if not storage.exists(uri):
        return None
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as kept:
            (num_queries, num_repeated), numbers = kept["counts"].tolist(), kept["numbers"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if numbers.shape != shape or numbers.dtype != np.int64:
        return None
    return Searched(num_queries, num_repeated, taken_over=True), numbers


def keep_facts(uri: str, facts: Facts) -> None:
    """Writes what was measured of an index, whole or not at all.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    storage.write_bytes(uri, json.dumps(facts).encode())


def kept_facts(uri: str) -> Facts | None:
    """What an earlier run measured of an index, or None if there is nothing, or it is torn.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    if not storage.exists(uri):
        return None
    try:
        facts = json.loads(storage.read_bytes(uri))
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "recall" in facts else None
