"""Vectors of a model that distrl trained: what users did, and no text."""

import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int64

from distrl.contract import Catalog
from distrl.errors import DivergedError
from distrl.methods import MethodConfig, build
from distrl.nn.histories import pad_histories
from distrl.ops.ragged import Ragged
from distrl.schema import PAD_ID
from distrl.serving.artifact import Artifact


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A trained model without its code: Ray's processes read the arrays in shared memory."""

    settings: MethodConfig
    catalog: Catalog
    arrays: dict[str, np.ndarray]
    item_map: Int64[np.ndarray, " items"]
    """The model's id of each item id of the store, PAD's first; PAD_ID where it knows none."""

    @classmethod
    def of(cls, artifact: Artifact, store_ids: pa.Array) -> "TrainedModel":
        """Takes a model apart.

        Args:
            artifact: The model.
            store_ids: The caller's own ids: index i holds that of the store's item i + 1.

        Raises:
            SchemaError: If the store's ids are of another type than the model's.
        """
        known = artifact.item_ids(store_ids)
        state = artifact.method.state_dict()
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
        item_map = np.concatenate([[PAD_ID], known]).astype(np.int64)
        return cls(artifact.settings, artifact.catalog, arrays, item_map)

    @property
    def content_hash(self) -> str:
        """sha256 in hex of the weights, and of which items they are of."""
        digest = hashlib.sha256(self.settings.model_dump_json().encode())
        for name in sorted(self.arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.arrays[name]).tobytes())
        digest.update(self.item_map.tobytes())
        return digest.hexdigest()

    @property
    def unknown(self) -> Int64[np.ndarray, " unknown"]:
        """Item ids of the store that the model does not know."""
        return np.flatnonzero(self.item_map[1:] == PAD_ID) + 1


class TrainedEmbedder:
    """A trained model ready to give vectors."""

    def __init__(self, model: TrainedModel, batch_size: int, device: str) -> None:
        """Builds the model on the arrays' own memory."""
        self._item_map, self._max_len = model.item_map, model.catalog.max_len
        self._batch_size, self._device = batch_size, device
        with torch.device("meta"):
            method = build(model.settings, model.catalog)
        with warnings.catch_warnings():
            # Shared memory is read-only, and nothing here writes weights.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in model.arrays.items()}
        method.load_state_dict(tensors, assign=True)
        self._method = method.to(device).eval()
        with torch.inference_mode():
            self._vectors = self._method.item_vectors

    @torch.inference_mode()
    def items(self, item_ids: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n dimension"]:
        """Rows of the item table, zeros for items that the model does not know."""
        known = self._item_map[item_ids]
        found = self._vectors[torch.from_numpy(known).to(self._device)].float().cpu().numpy()
        found[known == PAD_ID] = 0.0
        return _finite(found)

    def states(self, windows: Ragged) -> Float32[np.ndarray, "windows dimension"]:
        """The state after each window; unknown items leave it, and an empty one has zeros."""
        values = self._item_map[windows.values]
        known = Ragged(values, windows.offsets).keep(values != PAD_ID)
        rows = np.flatnonzero(known.lengths > 0)
        found = np.zeros((len(windows.lengths), self._vectors.shape[1]), dtype=np.float32)
        # Alike lengths together: a batch is padded to its longest.
        rows = rows[np.argsort(known.lengths[rows], kind="stable")]
        for start in range(0, len(rows), self._batch_size):
            some = rows[start : start + self._batch_size]
            with torch.inference_mode():
                histories = pad_histories(known.take(some), self._max_len).to(self._device)
                found[some] = self._method.user_states(histories).float().cpu().numpy()
        return _finite(found)


def _finite(vectors: Float32[np.ndarray, "n dimension"]) -> Float32[np.ndarray, "n dimension"]:
    if not np.isfinite(vectors).all():
        raise DivergedError("the trained model has vectors that are not finite")
    return vectors
