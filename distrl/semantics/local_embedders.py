"""Embedders whose weights lie on this machine: sentence-transformers and transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from jaxtyping import Float32
from torch import Tensor, nn

from distrl.errors import ConfigError
from distrl.semantics.embed_config import SentenceTransformersConfig, TransformersConfig


class SentenceEmbedder:
    """A sentence-transformers model with its own modules: pooling, and normalizing if it has it."""

    def __init__(self, config: SentenceTransformersConfig, folder: Path, device: str) -> None:
        """Loads the model; asks no network.

        Raises:
            ConfigError: If the folder holds no such model.
        """
        transformers.utils.logging.disable_progress_bar()
        self._batch_size = config.batch_size
        try:
            self._model = sentence_transformers.SentenceTransformer(
                str(folder), device=device, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise _no_model(folder, "sentence-transformers", error) from error
        limits = (self._model.max_seq_length, _padded_positions(self._model))
        most = min((each for each in limits if each is not None), default=None)
        if config.max_tokens is not None:
            _check_limit(config.max_tokens, most)
        limit = config.max_tokens or most
        if limit is not None:
            self._model.max_seq_length = limit

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        """One vector a text."""
        found = self._model.encode(
            texts,
            batch_size=self._batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=False,
        )
        return np.asarray(found, dtype=np.float32)


class TransformersEmbedder:
    """A transformers encoder with a pooling; vectors are not normalized."""

    def __init__(self, config: TransformersConfig, folder: Path, device: str) -> None:
        """Loads the model; asks no network.

        Raises:
            ConfigError: If the folder holds no such model, or it has no pooled output.
        """
        transformers.utils.logging.disable_progress_bar()
        self._config, self._device = config, device
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True
            )
            # Any: the stubs do not know what an AutoModel becomes.
            self._model: Any = transformers.AutoModel.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise _no_model(folder, "transformers", error) from error
        self._model.to(device).eval()
        self._max_tokens = self._limit()

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        """One vector a text."""
        order = np.argsort([-len(text) for text in texts], kind="stable")
        size, found = self._config.batch_size, []
        for start in range(0, len(texts), size):
            found.append(self._pooled([texts[i] for i in order[start : start + size]]))
        vectors = np.concatenate(found)
        return vectors[np.argsort(order, kind="stable")]

    @torch.inference_mode()
    def _pooled(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        output = self._model(**tokens)
        states: Tensor = output.last_hidden_state
        if self._config.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ConfigError(
                    f"embedder.pooling=pooler: the model in {self._config.folder} has no pooled "
                    "output; take mean or cls"
                )
        elif self._config.pooling == "cls":
            pooled = states[:, 0]
        else:
            is_token = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * is_token).sum(dim=1) / is_token.sum(dim=1)
        return pooled.float().cpu().numpy()

    def _limit(self) -> int:
        positions = getattr(self._model.config, "max_position_embeddings", None)
        limits = (self._tokenizer.model_max_length, positions, _padded_positions(self._model))
        most = min(each or 1 << 30 for each in limits)
        if self._config.max_tokens is not None:
            _check_limit(self._config.max_tokens, most)
        return self._config.max_tokens or most


def _padded_positions(model: nn.Module) -> int | None:
    """Tokens that a model's table of positions has rows for; None if padding has no row in it.

    RoBERTa and its kin number tokens from padding_idx + 1 on: the rows up to there are no token's,
    though `max_position_embeddings` counts them.
    """
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            padding = table.padding_idx
            return None if padding is None else table.num_embeddings - padding - 1
    return None


def _check_limit(asked: int, most: int | None) -> None:
    if most is not None and asked > most:
        raise ConfigError(f"embedder.max_tokens={asked}: the model reads {most} tokens at most")


def _no_model(folder: Path, library: str, error: Exception) -> ConfigError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(f"{folder} holds no model that {library} can load: {first}")
