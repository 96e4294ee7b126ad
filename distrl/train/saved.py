"""A trained model out of a checkpoint's folder, wherever that lies."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from jaxtyping import Int64
from pydantic import ValidationError

from distrl.contract import Catalog, Method
from distrl.data.store import read_item_ids, read_manifest
from distrl.engine.checkpoint import WEIGHTS_FILE, load_weights
from distrl.errors import CheckpointError
from distrl.methods import build, parse_method
from distrl.schema import PAD_ID
from distrl.storage import explained, filesystem

RUN_FILE = "run.json"
COPY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A trained model, and what it takes to rank a store with it."""

    method: Method
    max_len: int
    item_ids: pa.Array
    """The caller's own ids: index i holds that of the model's item i + 1."""


def read_checkpoint(checkpoint_uri: str) -> tuple[SavedModel, str]:
    """The model of a checkpoint, and the URI of the store it was trained on.

    Raises:
        CheckpointError: If the folder is no checkpoint, or it is torn.
        StorageError: If the checkpoint or its store cannot be read.
    """
    fs, path = filesystem(checkpoint_uri)
    with model_files(fs, path, checkpoint_uri) as folder:
        store_uri = run_settings(folder)["data"]["store_uri"]
        manifest = read_manifest(store_uri)
        method, max_len = load_model(folder, manifest.num_items)
    return SavedModel(method, max_len, read_item_ids(store_uri, manifest)), store_uri


def load_model(folder: Path, num_items: int) -> tuple[Method, int]:
    """The model in a checkpoint's folder on this machine, and its `max_len`.

    Raises:
        CheckpointError: If the folder is no checkpoint, is torn, or is of another catalog.
    """
    settings = run_settings(folder)
    try:
        max_len = int(settings["data"]["max_len"])
        method = build(parse_method(settings["method"]), Catalog(num_items, max_len))
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{folder / RUN_FILE} does not describe a method: {error}") from error
    load_weights(method, folder)
    return method.eval(), max_len


def run_settings(folder: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint carries.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        return json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RUN_FILE} is missing or torn: {error}") from error


@contextmanager
def model_files(fs: pafs.FileSystem, path: str, uri: str) -> Iterator[Path]:
    """The folder of a checkpoint on this machine: its own, or a copy without optimizer states.

    Args:
        fs: Where the checkpoint lies.
        path: Its folder there.
        uri: How to name it in an error.

    Raises:
        CheckpointError: If it is no checkpoint.
        StorageError: If it cannot be read.
    """
    if isinstance(fs, pafs.LocalFileSystem):
        if not Path(path, RUN_FILE).is_file():
            raise CheckpointError(f"{uri} is no checkpoint: it holds no {RUN_FILE}")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="distrl-model-") as copy:
        for name in (RUN_FILE, WEIGHTS_FILE):
            try:
                with (
                    fs.open_input_stream(f"{path}/{name}") as source,
                    Path(copy, name).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target, COPY_BYTES)
            except FileNotFoundError as error:
                raise CheckpointError(f"{uri} is no checkpoint: it holds no {name}") from error
            except OSError as error:
                raise explained(uri, "read", error) from error
        yield Path(copy)


def item_map(store_ids: pa.Array, model_ids: pa.Array) -> Int64[np.ndarray, " items"] | None:
    """The model's id of each item id of a store, PAD_ID where it knows the item not.

    Args:
        store_ids: The caller's own ids: index i holds that of the store's item i + 1.
        model_ids: The same of the model.

    Returns:
        None where both number the same items alike. The first entry is PAD's.

    Raises:
        CheckpointError: If the ids are of different types, strings and integers say.
    """
    if store_ids.equals(model_ids):
        return None
    if store_ids.type != model_ids.type:
        raise CheckpointError(
            f"the store's item ids are of type {store_ids.type}, the model's of "
            f"{model_ids.type}: they are not of the same catalog"
        )
    found = pc.call_function("index_in", [store_ids], pc.SetLookupOptions(model_ids))
    place = pc.fill_null(found, -1)
    return np.concatenate([[PAD_ID], place.to_numpy().astype(np.int64) + PAD_ID + 1])
