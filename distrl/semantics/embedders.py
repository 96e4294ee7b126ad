"""Embedders by what the config says, loaded where they run; heavy libraries come in only then."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int64

from distrl.errors import ConfigError
from distrl.ops.ragged import Ragged
from distrl.semantics.embed_config import (
    EmbedConfig,
    EndpointConfig,
    SentenceTransformersConfig,
    TrainedConfig,
)
from distrl.semantics.weights import check_weights, weights_folder


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the driver knows of the model."""

    label: str
    """What people call it."""
    sha256: str
    """Of the weights, in hex; empty for an endpoint."""
    trained: Any = None
    """Reference to a `TrainedModel`, for embedder.kind=trained."""
    num_unknown: int = 0
    """Items of the store that a trained model does not know."""


class TextEmbedder(Protocol):
    """Texts to vectors."""

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        """One vector a text."""
        ...


class CollaborativeEmbedder(Protocol):
    """Items and windows to vectors, without texts."""

    def items(self, item_ids: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n dimension"]:
        """One vector an item."""
        ...

    def states(self, windows: Ragged) -> Float32[np.ndarray, "windows dimension"]:
        """One vector a window."""
        ...


@dataclass(frozen=True, slots=True)
class Embedder:
    """A loaded model, of one of the two kinds."""

    dimension: int
    texts: TextEmbedder | None = None
    collaborative: CollaborativeEmbedder | None = None

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        """One vector a text."""
        assert self.texts is not None, "the config checks that texts go to a text embedder"
        return self.texts.embed(texts)

    def items(self, item_ids: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n dimension"]:
        """One vector an item."""
        assert self.collaborative is not None, "the config checks it"
        return self.collaborative.items(item_ids)

    def states(self, windows: Ragged) -> Float32[np.ndarray, "windows dimension"]:
        """One vector a window."""
        assert self.collaborative is not None, "the config checks it"
        return self.collaborative.states(windows)


def load(config: EmbedConfig, model: LoadedModel) -> Embedder:
    """The embedder, ready in this process.

    Raises:
        ConfigError: If there is no such model here, or other weights than on the driver.
    """
    if isinstance(config.embedder, EndpointConfig):
        return _of_texts(endpoint(config.embedder))
    device = _start_torch(config)
    if isinstance(config.embedder, TrainedConfig):
        import ray

        from distrl.semantics.trained import TrainedEmbedder

        trained = TrainedEmbedder(ray.get(model.trained), config.embedder.batch_size, device)
        return Embedder(trained.items(np.array([1])).shape[1], collaborative=trained)
    folder = weights_folder(config.embedder)
    check_weights(folder, model.sha256)
    from distrl.semantics.local_embedders import SentenceEmbedder, TransformersEmbedder

    if isinstance(config.embedder, SentenceTransformersConfig):
        return _of_texts(SentenceEmbedder(config.embedder, folder, device))
    return _of_texts(TransformersEmbedder(config.embedder, folder, device))


def endpoint(config: EndpointConfig) -> TextEmbedder:
    """The client of a server; imports what it needs.

    Raises:
        ConfigError: If the variable that shall hold the key is empty.
    """
    from distrl.semantics.endpoint_embedder import EndpointEmbedder

    return EndpointEmbedder(config)


def _of_texts(texts: TextEmbedder) -> Embedder:
    return Embedder(texts.embed(["how long is a vector"]).shape[1], texts=texts)


def _start_torch(config: EmbedConfig) -> str:
    """Sets this process' threads, and says on which device it computes."""
    import torch

    torch.set_num_threads(max(1, int(config.cpus_per_actor)))
    if config.gpus_per_actor == 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"gpus_per_actor={config.gpus_per_actor:g}, but torch sees no GPU on a node that Ray "
            "says has one"
        )
    return "cuda"
