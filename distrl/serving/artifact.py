"""A trained model as a folder that anyone can read.

::

    model.safetensors  the method's weights
    method.json        the resolved method config, and the sizes of the catalog
    items.parquet      item_id (1..V, ascending), item (the caller's own id)

Nothing in it is a pickle, so that loading it runs no code but ours.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distrl.contract import Catalog, Method
from distrl.errors import CheckpointError, SchemaError
from distrl.methods import MethodConfig, build, parse_method
from distrl.schema import PAD_ID

WEIGHTS_FILE = "model.safetensors"
METHOD_FILE = "method.json"
ITEMS_FILE = "items.parquet"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Artifact:
    """A trained model, and what it takes to speak to it in the caller's own ids."""

    method: Method
    settings: MethodConfig
    catalog: Catalog
    items: pa.Array
    """The caller's own ids (string or int64): index i holds that of item i + 1."""

    def item_ids(self, own: pa.Array) -> Int64[np.ndarray, " ids"]:
        """The model's id of each of the caller's own, PAD_ID where it does not know it.

        Raises:
            SchemaError: If the ids are of a type that does not cast to the model's.
        """
        try:
            asked = own.cast(self.items.type)
        except pa.ArrowInvalid as error:
            raise SchemaError(
                f"item ids of type {own.type} are asked for, the model's are {self.items.type}: "
                f"{error}"
            ) from error
        lookup = pc.SetLookupOptions(self.items, skip_nulls=True)
        places = pc.call_function("index_in", [asked], lookup).fill_null(-1)
        return places.to_numpy().astype(np.int64) + PAD_ID + 1


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Writes a model's folder.

    Raises:
        SchemaError: If there is not one id for each item of the catalog.
    """
    num_items = artifact.catalog.num_items
    if len(artifact.items) != num_items:
        raise SchemaError(
            f"the model knows {num_items} items, but {len(artifact.items)} ids were given"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().contiguous().cpu()
        for name, tensor in artifact.method.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)
    description = {
        "format_version": FORMAT_VERSION,
        "method": artifact.settings.model_dump(mode="json"),
        "catalog": asdict(artifact.catalog),
    }
    (folder / METHOD_FILE).write_text(json.dumps(description, indent=1))
    ids = pa.array(np.arange(PAD_ID + 1, num_items + 1, dtype=np.int32))
    pq.write_table(pa.table({"item_id": ids, "item": artifact.items}), folder / ITEMS_FILE)


def read_artifact(folder: Path) -> Artifact:
    """The model of a folder, in eval mode, on the CPU.

    Raises:
        CheckpointError: If a file is missing, or not what `write_artifact` writes.
    """
    try:
        description = json.loads((folder / METHOD_FILE).read_text())
        if description["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / METHOD_FILE} is of format_version {description['format_version']}; "
                f"this distrl reads {FORMAT_VERSION}"
            )
        settings = parse_method(description["method"])
        catalog = Catalog(**description["catalog"])
        method = _loaded(settings, catalog, folder / WEIGHTS_FILE)
        items = _read_items(folder / ITEMS_FILE, catalog.num_items)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, pa.ArrowException) as error:
        said = str(error).splitlines()[0] if not isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{folder} holds no whole model: {said}") from error
    return Artifact(method, settings, catalog, items)


def _loaded(settings: MethodConfig, catalog: Catalog, weights: Path) -> Method:
    # Built without memory, and then given the weights' own: a large table exists once.
    with torch.device("meta"):
        method = build(settings, catalog)
    try:
        method.load_state_dict(load_file(weights), assign=True)
    except RuntimeError as error:  # torch's word for names and shapes that do not fit
        raise CheckpointError(f"{weights} does not fit its method: {error}") from error
    return method.eval()


def _read_items(path: Path, num_items: int) -> pa.Array:
    table = pq.read_table(path, columns=["item_id", "item"])
    ids = table.column("item_id").to_numpy()
    if len(ids) != num_items or (len(ids) and (ids[0], ids[-1]) != (PAD_ID + 1, num_items)):
        raise CheckpointError(f"{path} does not number its items 1..{num_items} in order")
    items = table.column("item").combine_chunks()
    return pa.concat_arrays(items.chunks) if isinstance(items, pa.ChunkedArray) else items
