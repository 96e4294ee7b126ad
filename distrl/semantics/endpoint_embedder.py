"""An embedder behind OpenAI's protocol: any server that answers /v1/embeddings."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
from jaxtyping import Float32

from distrl.errors import ConfigError, SchemaError, StorageError
from distrl.semantics.embed_config import EndpointConfig

_SAID_CHARS = 300
_AGAIN = (408, 409, 429)
"""Statuses below 500 that say nothing against the request, only against its time."""


class EndpointEmbedder:
    """Sends batches of texts, some at a time; repeats what fails for a while."""

    def __init__(self, config: EndpointConfig) -> None:
        """Takes the key from this process' environment; sends nothing yet.

        Raises:
            ConfigError: If the variable that shall hold the key is empty.
        """
        self._config = config
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise ConfigError(
                f"embedder.api_key_env={config.api_key_env}: the environment variable is not set; "
                "on a cluster give it to the job's processes (runtime_env, env_vars)"
            )
        self._client = openai.OpenAI(
            base_url=config.base_url,
            # The client insists on a key; a server without keys does not look at it.
            api_key=self._key or "none",
            timeout=config.timeout_s,
            max_retries=config.retries,
        )

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        """One vector a text.

        Raises:
            ConfigError: If the server refuses the key, the model or a text.
            SchemaError: If it does not answer with a vector for each text.
            StorageError: If it cannot be reached, or is overloaded or fails on and on.
        """
        size = self._config.batch_size
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        pool = ThreadPoolExecutor(self._config.parallel_requests)
        try:
            found = list(pool.map(self._request, batches))
        finally:
            pool.shutdown(cancel_futures=True)
        if len({vectors.shape[1] for vectors in found}) != 1:
            raise SchemaError(f"{self._config.base_url} answers with vectors of several sizes")
        return np.concatenate(found)

    def _request(self, texts: list[str]) -> Float32[np.ndarray, "texts dimension"]:
        config = self._config
        cut = [text[: config.max_chars] for text in texts]
        dimensions = openai.omit if config.dimensions is None else config.dimensions
        try:
            answer = self._client.embeddings.create(
                model=config.model, input=cut, encoding_format="float", dimensions=dimensions
            )
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        entries = sorted(answer.data or [], key=lambda entry: entry.index)
        if [entry.index for entry in entries] != list(range(len(texts))):
            raise SchemaError(
                f"{config.base_url} was sent {len(texts)} texts and answered with {len(entries)} "
                "vectors, or misnumbered ones"
            )
        vectors = np.array([entry.embedding for entry in entries], dtype=np.float32)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise SchemaError(f"{config.base_url} answered with something that is no vector")
        return vectors

    def _explained(self, error: openai.OpenAIError) -> ConfigError | StorageError:
        """One sentence without the key, which servers like to repeat."""
        config = self._config
        where = f"embedder.base_url={config.base_url}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            given = f"the key in {config.api_key_env}" if config.api_key_env else "no key"
            return ConfigError(
                f"{where} answered {error.status_code} to {given}: put a valid key into an "
                "environment variable and name it in embedder.api_key_env"
            )
        said = str(error).strip().splitlines()[0][:_SAID_CHARS] if str(error).strip() else ""
        said = said.replace(self._key, "***") if self._key else said
        if isinstance(error, openai.APIStatusError):
            if error.code == "insufficient_quota":
                return ConfigError(f"the account at {where} is spent: {said}")
            if error.status_code < 500 and error.status_code not in _AGAIN:
                return ConfigError(f"{where} refuses model={config.model}: {said}")
        return StorageError(
            f"{where} does not serve now, after {config.retries} retries: {said}; finished parts "
            "are kept, and the same command goes on with the others"
        )
