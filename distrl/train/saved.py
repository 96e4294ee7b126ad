"""Trained models as they lie about: in a run's checkpoint, in the registry."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from jaxtyping import Int64
from pydantic import BaseModel, ValidationError

from distrl.contract import Catalog, Method
from distrl.data.store import read_item_ids, read_manifest
from distrl.engine.checkpoint import WEIGHTS_FILE, load_weights
from distrl.errors import CheckpointError
from distrl.methods import MethodConfig, build
from distrl.schema import PAD_ID
from distrl.serving.artifact import Artifact, read_artifact
from distrl.storage import explained, filesystem
from distrl.tracking.registry import Registry

RUN_FILE = "run.json"
COPY_BYTES = 1 << 22


class _Data(BaseModel):
    store_uri: str
    max_len: int


class _Run(BaseModel):
    """What of a run's config is needed to build its model; the rest is passed over."""

    method: MethodConfig
    data: _Data


def read_checkpoint(checkpoint_uri: str) -> tuple[Artifact, str]:
    """The model of a checkpoint, and the URI of the store it was trained on.

    Raises:
        CheckpointError: If the folder is no checkpoint, or it is torn.
        StorageError: If the checkpoint or its store cannot be read.
    """
    fs, path = filesystem(checkpoint_uri)
    with model_files(fs, path, checkpoint_uri) as folder:
        run = _run(folder)
        manifest = read_manifest(run.data.store_uri)
        method, catalog = load_model(folder, manifest.num_items)
    items = read_item_ids(run.data.store_uri, manifest)
    return Artifact(method, run.method, catalog, items), run.data.store_uri


def read_registered(model_uri: str, tracking_uri: str) -> Artifact:
    """The model that `models:/name/1` or `models:/name@alias` names.

    Raises:
        TrackingError: If there is no such model, or MLflow cannot be reached.
        CheckpointError: If its files are torn.
    """
    registry = Registry(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="distrl-model-") as folder:
        return read_artifact(registry.download(registry.resolve(model_uri), Path(folder)))


def load_model(folder: Path, num_items: int) -> tuple[Method, Catalog]:
    """The model in a checkpoint's folder on this machine, in eval mode.

    Raises:
        CheckpointError: If the folder is no checkpoint, is torn, or is of another catalog.
    """
    run = _run(folder)
    catalog = Catalog(num_items, run.data.max_len)
    method = build(run.method, catalog)
    load_weights(method, folder)
    return method.eval(), catalog


def item_map(artifact: Artifact, store_ids: pa.Array) -> Int64[np.ndarray, " items"] | None:
    """The model's id of each item id of a store, PAD's first; None where they are the same.

    Args:
        artifact: The model.
        store_ids: The caller's own ids: index i holds that of the store's item i + 1.

    Raises:
        SchemaError: If the store's ids are of another type than the model's.
    """
    if artifact.items.equals(store_ids):
        return None
    return np.concatenate([[PAD_ID], artifact.item_ids(store_ids)])


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
        for name in (RUN_FILE, WEIGHTS_FILE):
            if not Path(path, name).is_file():
                raise CheckpointError(f"{uri} is no checkpoint: it holds no {name}")
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


def _run(folder: Path) -> _Run:
    path = folder / RUN_FILE
    try:
        return _Run.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise CheckpointError(
            f"{path} does not describe a run of this distrl: {where}: {problem['msg']}"
        ) from error
