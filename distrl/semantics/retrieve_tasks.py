"""What runs in Ray's tasks while neighbors are retrieved; `distrl.semantics.retrieve` starts them.

Each is told its compute threads, which a worker's libraries would otherwise take all of.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Int64
from ray import ObjectRef
from threadpoolctl import threadpool_limits

from distrl.data.side_tables import Part, SideManifest, part_path, write_part, write_parts
from distrl.schema import Shard
from distrl.semantics.embedded import WindowShard, read_items, read_windows
from distrl.semantics.nearest import Best, Pool, Queries, among, nearest, recall
from distrl.semantics.neighbor_table import (
    Counts,
    groups,
    items_schema,
    items_table,
    pool_schema,
    total,
    windows_schema,
)
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.semantics.searched import Searched, keep_search, kept_search

_MB = 1 << 20


class PartIndex(NamedTuple):
    """An index of some successive pieces."""

    content: ObjectRef
    """In FAISS's format."""
    pieces: tuple[int, int]
    """The first of them, and the one after the last."""


@dataclass(frozen=True)
class Vectors:
    """Vectors in pieces in the object store, of which every node holds one copy."""

    what: str
    starts: tuple[int, ...]
    """Number of the first vector of each piece."""
    sizes: tuple[int, ...]
    pools: tuple[ObjectRef, ...]
    indexes: tuple[PartIndex, ...] = ()
    """Together of all pieces; none where search is exact."""

    def pieces(self, some: tuple[int, int] | None = None) -> Iterator[tuple[int, Pool]]:
        """The pieces, or some successive ones, each with the number of its first vector."""
        here = slice(*some) if some else slice(None)
        for start, pool in zip(self.starts[here], self.pools[here], strict=True):
            yield start, ray.get(pool)

    def with_indexes(self, indexes: Sequence[PartIndex]) -> "Vectors":
        """The same vectors, to be searched by indexes."""
        return replace(self, indexes=tuple(indexes))

    def cut(self, most: int) -> list[tuple[int, int]]:
        """Successive pieces, together at most so many vectors unless one piece has more."""
        bounds, held = [0], 0
        for piece, size in enumerate(self.sizes):
            if held and held + size > most:
                bounds.append(piece)
                held = 0
            held += size
        return list(pairwise([*bounds, len(self.sizes)]))


class Loaded(NamedTuple):
    """What a task read."""

    size: int
    num_sought: int
    num_zero: int


class Written(NamedTuple):
    """What a task wrote of one shard, and counts of it."""

    windows: Part
    pool: Part
    counts: Counts


def _loaded(pool: Pool) -> Loaded:
    present = np.any(pool.vectors, axis=1)
    zero = len(present) - int(np.count_nonzero(present))
    return Loaded(len(present), int(pool.sought.sum()), zero)


@ray.remote(num_returns=2)
def load_items(store_uri: str, table: SideManifest, part: Part, first: int) -> tuple[Loaded, Pool]:
    """The items of one part."""
    pool = read_items(store_uri, table, part, first)
    return _loaded(pool), pool


@ray.remote(num_returns=3)
def load_windows(
    config: RetrieveConfig, table: SideManifest, shard: int, sequences: Shard, rows_before: int
) -> tuple[Loaded, Pool, WindowShard]:
    """The windows of one shard."""
    pool, windows = read_windows(
        config.store_uri,
        table,
        shard,
        sequences,
        rows_before,
        held_out=config.held_out,
        exclude_same_user=config.exclude_same_user,
    )
    return _loaded(pool), pool, windows


@ray.remote(num_returns=2)
def sampled(start: int, pool: Pool, rows: Int64[np.ndarray, " rows"]) -> tuple[int, Queries]:
    """Some rows of a piece as queries, if their neighbors are sought."""
    queries = Queries.of(pool, start, rows)
    return len(queries.groups), queries


@ray.remote(num_returns=2)
def build_index(
    config: RetrieveConfig, vectors: Vectors, some: tuple[int, int], sample: Sequence[ObjectRef]
) -> tuple[int, np.ndarray]:
    """Bytes of the index of some successive pieces, and these."""
    from distrl.semantics import ann  # FAISS takes a second to load and is not always installed

    with threadpool_limits(config.cpus_per_task):
        trained_on = Queries.joined(ray.get(list(sample))).directions
        index = ann.build(vectors.pieces(some), trained_on, config)
        content = ann.to_bytes(index)
    return len(content), content


@ray.remote(num_returns=2)
def nearest_in_piece(
    config: RetrieveConfig, sample: Sequence[ObjectRef], start: int, pool: Pool
) -> tuple[int, Best]:
    """The nearest of all sampled queries within one piece, exactly."""
    queries = Queries.joined(ray.get(list(sample)))
    with threadpool_limits(config.cpus_per_task):
        best = nearest(queries, [(start, pool)], config.num_neighbors, config.block_mb * _MB)
    return len(pool.groups), best


@ray.remote(num_returns=2)
def measure_recall(
    config: RetrieveConfig,
    vectors: Vectors,
    sample: Sequence[ObjectRef],
    pieces: Sequence[ObjectRef],
) -> tuple[tuple[int, float], None]:
    """How many queries were sampled, and the recall of the index on them."""
    queries = Queries.joined(ray.get(list(sample)))
    exact = Best(len(queries.groups), config.num_neighbors)
    for piece in pieces:
        exact.merge(ray.get(piece))
    with threadpool_limits(config.cpus_per_task):
        found, _ = _search(queries, vectors, config)
    return (len(queries.groups), recall(found, exact)), None


@ray.remote(num_returns=2)
def search(
    config: RetrieveConfig, vectors: Vectors, piece: int, low: int, high: int, kept_uri: str
) -> tuple[Searched, Int64[np.ndarray, "rows K"]]:
    """Numbers of the neighbors of rows low..high of a piece, -1 for none; they are kept."""
    shape = (high - low, config.num_neighbors)
    kept = kept_search(kept_uri, shape)
    if kept is not None:
        return kept
    pool, rows = ray.get(vectors.pools[piece]), np.arange(low, high)
    sought = pool.sought[low:high]
    queries = Queries.of(pool, vectors.starts[piece], rows)
    numbers = np.full(shape, -1, np.int64)
    with threadpool_limits(config.cpus_per_task):
        best, num_repeated = _search(queries, vectors, config)
    numbers[sought] = best.numbers
    searched = Searched(len(best.numbers), num_repeated)
    keep_search(kept_uri, searched, numbers)
    return searched, numbers


@ray.remote(num_returns=2)
def write_items(
    config: RetrieveConfig, part: int, first: int, found: Sequence[ObjectRef]
) -> tuple[tuple[Part, int], None]:
    """The part as written, and how many of its items have fewer neighbors than were asked for."""
    numbers = np.concatenate(ray.get(list(found)))
    # Vectors are numbered from 0, items from 1.
    numbers[numbers >= 0] += 1
    table = items_table(np.arange(first, first + len(numbers)), numbers)
    path = part_path("neighbors", config.table, "items", part)
    num_short = int((numbers[:, -1] < 0).sum())
    return (write_part(config.store_uri, path, [table], items_schema()), num_short), None


@ray.remote(num_returns=2)
def write_windows(
    config: RetrieveConfig,
    vectors: Vectors,
    windows: Sequence[ObjectRef],
    dimension: int,
    shard: int,
    found: Sequence[ObjectRef],
) -> tuple[Written, None]:
    """Both parts of a shard, a row group of each at a time."""

    def load(number: int) -> tuple[Pool, WindowShard]:
        pool, content = ray.get([vectors.pools[number], windows[number]])
        return pool, content

    numbers = np.concatenate([np.zeros((0, config.num_neighbors), np.int64), *ray.get(list(found))])
    counts: list[Counts] = []

    def tables(folder: Path) -> Iterator[tuple[pa.Table, pa.Table]]:
        for group in groups(shard, vectors.starts, numbers, load, folder):
            counts.append(group.counts)
            yield group.windows, group.pool

    schemas = {
        part_path("neighbors", config.table, "windows", shard): windows_schema(dimension),
        part_path("neighbors", config.table, "pool", shard): pool_schema(dimension),
    }
    with TemporaryDirectory(prefix="distrl-neighbors-") as folder:
        of_windows, of_pool = write_parts(config.store_uri, schemas, tables(Path(folder)))
    return Written(of_windows, of_pool, total(counts)), None


def _search(queries: Queries, vectors: Vectors, config: RetrieveConfig) -> tuple[Best, int]:
    """The nearest of each query, and how many were searched exactly after an index."""
    block = config.block_mb * _MB
    if not vectors.indexes:
        return nearest(queries, vectors.pieces(), config.num_neighbors, block), 0
    from distrl.semantics import ann

    best = Best(len(queries.groups), config.num_neighbors)
    for content, pieces in vectors.indexes:
        # The index is let go before the vectors come: a node need not hold both at once.
        met = ann.candidates(ann.from_bytes(ray.get(content)), queries, config)
        best.merge(among(queries, met, vectors.pieces(pieces), config.num_neighbors))
    short = np.flatnonzero(np.isneginf(best.least))
    if len(short):
        again = nearest(queries.take(short), vectors.pieces(), config.num_neighbors, block)
        best.scores[short], best.numbers[short] = again.scores, again.numbers
    return best, len(short)
