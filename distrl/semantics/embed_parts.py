"""Parts of a table of embeddings, made one after another by an actor that holds the model once."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from distrl import storage
from distrl.data.ray_stage import fetch
from distrl.data.side_tables import Part, SideManifest, part_path, read_part, write_part
from distrl.errors import ConfigError, DistrlError, SchemaError
from distrl.ops.windows import window_items
from distrl.schema import Config, Manifest
from distrl.semantics.embed_config import EmbedConfig
from distrl.semantics.embedders import Embedder, LoadedModel, load
from distrl.semantics.window_vectors import (
    check_rows,
    joined,
    means,
    most_windows,
    shard_windows,
)

KEY = b"distrl.key"
"""In a part's Parquet metadata: what it was made with."""
_MB = 1 << 20
_BATCHES_AT_ONCE = 8
"""Batches between two counts of what is done."""


class Unit(Config):
    """One part to be made."""

    folder: Literal["items", "windows"]
    number: int

    @property
    def name(self) -> str:
        """No other unit of the run has it."""
        return f"{self.folder}/{self.number}"


class Done(Config):
    """What became of a unit."""

    unit: Unit
    part: Part | None = None
    """None where it failed."""
    dimension: int = 0
    taken_over: bool = False
    """Whether an earlier job had made it with the same settings."""
    texts: int = 0
    distinct_texts: int = 0
    cpu_s: float = 0.0
    """Of the actor's process, without loading the model."""
    error_type: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class EmbedTask:
    """What all actors of a run share."""

    config: EmbedConfig
    manifest: Manifest
    key: str
    """sha256 in hex of all that decides what parts hold."""
    descriptions: SideManifest | None
    model: LoadedModel
    counter: Any
    """Actor that is told how many rows are done."""
    shared: dict[str, Any] = field(default_factory=dict)
    """References to `texts`, of items, and `item_vectors`, row by item id, where they are needed;
    Ray keeps one copy a node."""


def finished_part(store_uri: str, path: str, key: str) -> tuple[Part, int] | None:
    """A part that was made with this key, and its dimension; None if there is none.

    Raises:
        StorageError: If it cannot be read.
    """
    uri = storage.join(store_uri, path)
    if key_of_part(uri) != key:
        return None
    with storage.open_input(uri) as file:
        found = pq.ParquetFile(file)
        rows, dimension = found.metadata.num_rows, found.schema_arrow.field("vector").type.list_size
        digest, size = storage.digest(file)
    return Part(path=path, rows=rows, bytes=size, sha256=digest), dimension


def key_of_part(uri: str) -> str | None:
    """What a part says that it was made with; None where there is none, or it is torn."""
    if not storage.exists(uri):
        return None
    with storage.open_input(uri) as file:
        try:
            metadata = pq.read_schema(file).metadata or {}
        except pa.ArrowInvalid:
            return None
    return metadata.get(KEY, b"").decode() or None


class EmbedActor:
    """Makes one part after another; loads the model with the first that needs it.

    A user's mistake comes back as a row and not as Ray's stack trace.
    """

    def __init__(self, task: EmbedTask) -> None:
        self._task = task
        self._embedder: Embedder | None = None
        self._shared: dict[str, Any] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One unit as JSON in `unit`, what became of it as JSON in `done`."""
        (described,) = batch["unit"]
        unit = Unit.model_validate_json(str(described))
        try:
            done = self._make(unit)
        except DistrlError as error:
            done = Done(unit=unit, error_type=type(error).__name__, error=str(error))
        return {"done": [done.model_dump_json()]}

    def _make(self, unit: Unit) -> Done:
        config, key = self._task.config, self._task.key
        path = part_path("embeddings", config.name, unit.folder, unit.number)
        found = finished_part(config.store_uri, path, key)
        if found is not None:
            self._task.counter.add.remote(0, found[0].rows)
            return Done(unit=unit, part=found[0], dimension=found[1], taken_over=True)
        dimension = self.dimension(unit)  # loads what the part needs
        start, work = time.process_time(), _PartTexts(self)
        tables = self._items(unit, work) if unit.folder == "items" else self._windows(unit, work)
        columns = ("item_id",) if unit.folder == "items" else ("row", "length")
        schema = pa.schema(
            [
                *((name, pa.int32()) for name in columns),
                ("vector", pa.list_(pa.float32(), dimension)),
            ],
            metadata={KEY: key.encode()},
        )
        part = write_part(config.store_uri, path, tables, schema)
        return Done(
            unit=unit,
            part=part,
            dimension=dimension,
            texts=work.texts,
            distinct_texts=len(work.known),
            cpu_s=time.process_time() - start,
        )

    def dimension(self, unit: Unit) -> int:
        """Numbers of a vector."""
        if unit.folder == "windows" and self._task.config.source == "mean_of_items":
            return self.shared("item_vectors").shape[1]
        return self.embedder.dimension

    @property
    def embedder(self) -> Embedder:
        """The model, loaded when it is first asked for."""
        if self._embedder is None:
            self._embedder = load(self._task.config, self._task.model)
        return self._embedder

    def shared(self, name: str) -> Any:  # noqa: ANN401
        """What all actors of a node have in one place.

        Raises:
            DistrlError: As the task that made it raised it.
        """
        if name not in self._shared:
            self._shared[name] = fetch(self._task.shared[name])
        return self._shared[name]

    def count(self, rows: int) -> None:
        """Tells the driver of rows that are done."""
        self._task.counter.add.remote(rows, 0)

    def _items(self, unit: Unit, work: "_PartTexts") -> Iterator[pa.Table]:
        config, num_items = self._task.config, self._task.manifest.num_items
        first = unit.number * config.items_per_part + 1
        ids = np.arange(first, min(first + config.items_per_part, num_items + 1))
        if config.embedder.kind == "trained":
            vectors = self.embedder.items(ids)
            self.count(len(ids))
        else:
            vectors = work.vectors(self.shared("texts").take(pa.array(ids - 1)).to_pylist())
        yield _table({"item_id": ids}, vectors)

    def _windows(self, unit: Unit, work: "_PartTexts") -> Iterator[pa.Table]:
        config, manifest = self._task.config, self._task.manifest
        shard = manifest.sequences[unit.number]
        self._check_size(unit)
        described = self._described(unit)
        begin = 0
        groups = shard_windows(config.store_uri, manifest, shard, config.windows)
        for sequences, windows, first_row in groups:
            row = windows.row + first_row
            if config.source == "descriptions":
                table = described.slice(begin, len(row))
                check_rows(
                    f"part {unit.number} of {config.descriptions}", table, row, windows.length
                )
                begin += len(row)
                vectors = work.vectors(table.column("text").to_pylist())
            else:
                shown = window_items(sequences, windows, config.max_len)
                if config.source == "joined_texts":
                    vectors = work.vectors(joined(self.shared("texts"), shown))
                elif config.source == "user_states":
                    vectors = self.embedder.states(shown)
                else:
                    vectors = means(self.shared("item_vectors"), shown)
            if config.source in ("user_states", "mean_of_items"):
                self.count(len(row))
            yield _table({"row": row, "length": windows.length}, vectors)
        if described.num_rows != begin:
            raise SchemaError(
                f"part {unit.number} of descriptions {config.descriptions} has "
                f"{described.num_rows} windows, its sequence shard has {begin}"
            )

    def _described(self, unit: Unit) -> pa.Table:
        """The descriptions of a shard's windows; none where they are not what is embedded."""
        config, table = self._task.config, self._task.descriptions
        if config.source != "descriptions":
            return pa.table({"row": pa.array([], pa.int32())})
        assert table is not None, "the config checks it"
        part = table.window_parts[unit.number]
        return read_part(config.store_uri, part).read(columns=["row", "length", "text"])

    def _check_size(self, unit: Unit) -> None:
        config, shard = self._task.config, self._task.manifest.sequences[unit.number]
        most = most_windows(shard, config.windows)
        megabytes = most * self.dimension(unit) * 4 / _MB
        if megabytes > config.max_part_mb:
            raise ConfigError(
                f"shard {shard.path} has {most:,} windows, {megabytes:,.0f} MB of vectors, above "
                f"max_part_mb={config.max_part_mb}: take windows.which=last, prepare the store "
                "with a smaller shard_mb, or raise max_part_mb if tasks of jobs/retrieve.py, which "
                "hold about as much of it, have the memory"
            )


class _PartTexts:
    """Embeds the texts of one part, equal ones once."""

    def __init__(self, actor: EmbedActor) -> None:
        self._actor = actor
        self._config = actor._task.config
        self.texts = 0
        self.known: dict[bytes, np.ndarray] = {}

    def vectors(self, texts: list[str | None]) -> Float32[np.ndarray, "texts dimension"]:
        """One vector a text; zeros for none, if that is allowed."""
        missing = sum(not text for text in texts)
        if missing and self._config.missing == "error":
            raise SchemaError(
                f"{missing:,} of {len(texts):,} texts of a part are empty; give them one, or set "
                "missing=zero"
            )
        self.texts += len(texts) - missing
        keys = [hashlib.sha256(text.encode()).digest() if text else b"" for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if text}
        new = {key: text for key, text in new.items() if key not in self.known}
        self._embed(new, len(texts))
        found = np.zeros((len(texts), self._actor.embedder.dimension), dtype=np.float32)
        for place, key in enumerate(keys):
            if key:
                found[place] = self.known[key]
        return found

    def _embed(self, new: dict[bytes, str], num_rows: int) -> None:
        """Alike lengths together, as they fill a batch with the least padding."""
        ordered = sorted(new.items(), key=lambda entry: -len(entry[1]))
        at_once = _BATCHES_AT_ONCE * self._config.embedder.batch_size
        # Rows done are counted as texts are, those that need no embedding with the others.
        for begin, end in pairwise([*range(0, len(ordered), at_once), len(ordered)]):
            some = ordered[begin:end]
            vectors = self._actor.embedder.embed([text for _, text in some])
            self.known.update(zip((key for key, _ in some), vectors, strict=True))
            rows = end * num_rows // len(ordered) - begin * num_rows // len(ordered)
            self._actor.count(rows)
        if not ordered:
            self._actor.count(num_rows)


def _table(
    columns: dict[str, Int64[np.ndarray, " rows"]], vectors: Float32[np.ndarray, "rows dimension"]
) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    ids = {name: pa.array(values.astype(np.int32)) for name, values in columns.items()}
    return pa.table({**ids, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
