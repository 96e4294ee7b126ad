"""Views of trained models, laid out in two dimensions. Dimensions: P pairs, D hidden."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ValidationError
from sklearn.manifold import TSNE
from torch import Tensor

from distrl.contract import Batch, Method
from distrl.data.beside import read_beside
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash, read_manifest
from distrl.data.stream import local_batches
from distrl.errors import CheckpointError, ConfigError
from distrl.ops.diagnostics import view_diagnostics
from distrl.schema import PAD_ID
from distrl.storage import absolute, filesystem
from distrl.train.saved import RUN_FILE, load_model, model_files

ALIKE = ("samples", "long_sequences", "max_len", "contrasted_prefixes")
"""Settings of the data that decide which prefixes are contrasted."""

AUGMENTED = ("data", "learned")
"""Kinds of views that come of the random ones, a row a pair."""


class _Run(BaseModel):
    """What of a run's config is needed to draw its views; the rest is passed over."""

    data: DataConfig


@dataclass(frozen=True, slots=True)
class ShownModel:
    """A trained model and the data settings that it was trained with."""

    label: str
    method: Method
    data: DataConfig
    num_items: int


@dataclass(frozen=True, slots=True)
class ViewMap:
    """One kind of view of one model."""

    label: str
    """Of the model."""
    kind: str
    """`data` for the encoder's states of augmented sequences, h in MCLRec; `learned` for what its
    augmenters make of them, z."""
    first: Float[np.ndarray, "P 2"]
    second: Float[np.ndarray, "P 2"]
    hidden: tuple[Bool[np.ndarray, " P"], Bool[np.ndarray, " P"]]
    """Whether the newest item of the first and of the second view is masked."""
    diagnostics: Mapping[str, float]
    """Of the views themselves, not of the map."""
    hidden_size: int


def read_model(label: str, checkpoint_uri: str, store_uri: str | None) -> ShownModel:
    """The model of a checkpoint, in evaluation mode.

    Args:
        label: What to call it.
        checkpoint_uri: Folder of a checkpoint, local or not.
        store_uri: The store it is shown on; None takes the one that it was trained on.

    Raises:
        CheckpointError: If the folder is no checkpoint, is torn, or is of another catalog.
        StorageError: If the checkpoint or the store cannot be read.
        SchemaError: If the store has no valid manifest.
    """
    fs, path = filesystem(checkpoint_uri)
    with model_files(fs, path, checkpoint_uri) as folder:
        try:
            data = _Run.model_validate_json((folder / RUN_FILE).read_bytes()).data
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "the file"
            raise CheckpointError(
                f"{checkpoint_uri}/{RUN_FILE} does not describe a run of this distrl: {where}: "
                f"{problem['msg']}"
            ) from error
        data = data.model_copy(update={"store_uri": absolute(store_uri or data.store_uri)})
        num_items = read_manifest(data.store_uri).num_items
        method, _ = load_model(folder, num_items)
    return ShownModel(label, method, data, num_items)


def check_alike(models: list[ShownModel]) -> None:
    """That all models can be shown the same prefixes.

    Raises:
        ConfigError: Naming the setting in which a model differs from the first.
        StorageError: If a store cannot be read.
    """
    first = models[0]
    stores = {model.data.store_uri for model in models}
    if len({manifest_hash(read_manifest(uri)) for uri in stores}) > 1:
        raise ConfigError(
            f"the models were trained on different stores, {', '.join(sorted(stores))}; name the "
            "one to show them on as store_uri"
        )
    for model, name in ((model, name) for model in models[1:] for name in ALIKE):
        ours, theirs = getattr(first.data, name), getattr(model.data, name)
        if ours != theirs:
            raise ConfigError(
                f"{model.label} was trained with data.{name}={theirs} and {first.label} with "
                f"{ours}: they were not contrasted on the same prefixes; map them apart"
            )


def contrasted(model: ShownModel, num_pairs: int, seed: int) -> Batch:
    """Samples of the store as training serves them, with views as the model's run draws them.

    Equal settings and seed give the same samples, and with equal `data.augment` the same views.

    Raises:
        ConfigError: If the store has fewer than `num_pairs` samples, or its views are to substitute
            and it has no table for it.
        SchemaError: If a shard of the store is torn.
        StorageError: If one cannot be read.
    """
    manifest = read_manifest(model.data.store_uri)
    config = model.data.model_copy(update={"batch_size": num_pairs, "prefetch_batches": 1})
    beside = read_beside(config, manifest)
    maker = BatchMaker.of(config, model.method, model.num_items, seed, beside)
    if not maker.num_views:
        maker = replace(maker, num_views=2)
    stream = local_batches(
        manifest, config, maker, epochs=1, ledger=Ledger(manifest_hash(manifest))
    )
    try:
        batch, consumed = next(stream)
    finally:
        stream.close()
    if len(consumed.serial) < num_pairs:
        raise ConfigError(
            f"num_pairs={num_pairs}, but {config.store_uri} has {len(consumed.serial)} samples"
        )
    return batch


def map_views(
    model: ShownModel, *, num_pairs: int, perplexity: float, seed: int
) -> tuple[ViewMap, ...]:
    """A map of each kind of view that the model has, both views of a pair in one map.

    Raises:
        ConfigError: If the model has no views, or the store too few samples.
        SchemaError: If a shard of the store is torn.
        StorageError: If one cannot be read.
    """
    batch = contrasted(model, num_pairs, seed)
    with torch.no_grad():
        states = model.method.view_states(batch)
    if not states:
        raise ConfigError(
            f"{model.label} has no views to show: its method contrasts none; name a checkpoint of "
            "cl4srec, mclrec, laclrec or sracl"
        )
    hidden = _newest_hidden(batch, model.num_items, num_pairs)
    return tuple(
        ViewMap(
            model.label,
            kind,
            *_laid_out(first[:num_pairs], second[:num_pairs], perplexity, seed),
            hidden if kind in AUGMENTED else _nothing_hidden(len(first[:num_pairs])),
            view_diagnostics(first[:num_pairs], second[:num_pairs]),
            first.shape[1],
        )
        for kind, (first, second) in states.items()
    )


def _newest_hidden(
    batch: Batch, num_items: int, num_pairs: int
) -> tuple[Bool[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """Where a view ends in PAD or in the mask token."""
    assert batch.views is not None, "it was made with views"
    ends = [view.items.flatten()[view.last[:num_pairs]].numpy() for view in batch.views]
    first, second = ((end == PAD_ID) | (end > num_items) for end in ends)
    return first, second


def _nothing_hidden(
    count: int,
) -> tuple[Bool[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """Of views that no mask has made."""
    return np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)


def _laid_out(
    first: Float[Tensor, "P D"], second: Float[Tensor, "P D"], perplexity: float, seed: int
) -> tuple[Float[np.ndarray, "P 2"], Float[np.ndarray, "P 2"]]:
    """Both views in one map, by t-SNE on cosine distances, in which collapse is measured."""
    both = torch.nn.functional.normalize(torch.cat([first, second]).double(), dim=1).numpy()
    layout = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    # On unit vectors squared Euclidean distance is twice the cosine distance.
    points = layout.fit_transform(both).astype(np.float64)
    return points[: len(first)], points[len(first) :]
