"""Approximate neighbors: all that touches FAISS.

An index holds directions as float16, and answers with numbers of vectors; which of them are nearest
is then decided by `distrl.semantics.nearest` on the vectors themselves. Indexes travel in FAISS's
own format and are read where they lie, so that all tasks of a node share one copy.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from distrl.semantics.nearest import Pool, Queries, directions_of
from distrl.semantics.retrieve_config import RetrieveConfig

# FAISS's stubs do not know what its Python layer adds to the wrapped classes.
faiss: Any = _faiss
Index = Any

_TRAINED_ON_PER_LIST = 64
_ADDED_AT_ONCE = 1 << 14


def build(
    pools: Iterable[tuple[int, Pool]],
    sample: Float32[np.ndarray, "sample D"],
    config: RetrieveConfig,
) -> Index:
    """An index of all vectors that are not zero.

    Args:
        pools: The vectors in pieces, each with the number of its first.
        sample: Directions that the cells of an ivf index are made of; see `sample_size`. There
            are no more cells than these.
        config: Which index, and its knobs; resolved.
    """
    faiss.omp_set_num_threads(config.cpus_per_task)
    index = _empty(len(sample), sample.shape[1], config)
    index.train(sample)
    for first, pool in pools:
        for low in range(0, len(pool.groups), _ADDED_AT_ONCE):
            directions = directions_of(pool.vectors[low : low + _ADDED_AT_ONCE])
            rows = np.flatnonzero(directions.any(axis=1))
            index.add_with_ids(directions[rows], first + low + rows)
    return index


def sample_size(config: RetrieveConfig) -> int:
    """Vectors that an index is trained on."""
    return _TRAINED_ON_PER_LIST * (config.num_lists or 1) if config.index == "ivf" else 1


def _empty(num_sampled: int, dimension: int, config: RetrieveConfig) -> Index:
    metric, stored = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_fp16
    if config.index == "hnsw":
        graph = faiss.IndexHNSWSQ(dimension, stored, config.num_links, metric)
        graph.hnsw.efConstruction = config.ef_construction
        return faiss.IndexIDMap(graph)
    lists = min(config.num_lists or 1, num_sampled)
    cells = faiss.IndexFlatIP(dimension)
    # Directions and not their differences from a center: float16 is fine enough for both.
    index = faiss.IndexIVFScalarQuantizer(cells, dimension, lists, stored, metric, False)
    # A small store has fewer vectors a cell than FAISS likes, and says so at every build.
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINED_ON_PER_LIST
    index.cp.spherical = True
    return index


def to_bytes(index: Index) -> UInt8[np.ndarray, " bytes"]:
    """An index in FAISS's format, out of memory: pages of a file that is gone when they are."""
    with tempfile.TemporaryDirectory(prefix="distrl-index-") as folder:
        path = Path(folder, "index")
        faiss.write_index(index, str(path))
        return np.asarray(np.memmap(path, np.uint8, mode="r"))


def from_bytes(content: UInt8[np.ndarray, " bytes"]) -> Index:
    """The index whose vectors stay where `content` lies."""
    reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(content), content.nbytes)
    index = faiss.read_index(reader)
    # FAISS would not notice that the memory which it looks at is given back.
    index.referenced_objects = [content]
    return index


def candidates(
    index: Index,
    queries: Queries,
    config: RetrieveConfig,
) -> Int64[np.ndarray, "Q C"]:
    """Numbers of vectors that may be nearest, and -1.

    A query of a small group is asked for as many more as its group has, which may be what is found
    first; the queries of a larger one are asked together, with their group left out.

    Args:
        index: As `from_bytes` gives.
        queries: Whose neighbors are sought.
        config: The index's knobs.
    """
    faiss.omp_set_num_threads(config.cpus_per_task)
    wanted = 2 * config.num_neighbors
    small = queries.group_sizes <= config.most_more
    more = np.where(small, queries.group_sizes, 0)
    # Few different counts, so that there are few calls.
    counts = np.where(more > 0, wanted + 2 ** np.ceil(np.log2(np.maximum(more, 1))), wanted)
    counts = counts.astype(np.int64)
    found = np.full((len(small), int(counts.max(initial=1))), -1, np.int64)
    for count in np.unique(counts[small]).tolist():
        rows = np.flatnonzero(small & (counts == count))
        _search(index, queries.directions, rows, found[:, :count], _parameters(count, config, None))
    for first in np.unique(queries.group_first[~small]).tolist():
        rows = np.flatnonzero(~small & (queries.group_first == first))
        own = faiss.IDSelectorRange(first, first + int(queries.group_sizes[rows[0]]))
        others = faiss.IDSelectorNot(own)
        parameters = _parameters(wanted, config, others)
        _search(index, queries.directions, rows, found[:, :wanted], parameters)
    return found


def _search(
    index: Index,
    directions: Float32[np.ndarray, "Q D"],
    rows: Int64[np.ndarray, " rows"],
    found: Int64[np.ndarray, "Q C"],
    parameters: Index,
) -> None:
    """Writes what an index answers for some rows."""
    _, found[rows] = index.search(directions[rows], found.shape[1], params=parameters)


def _parameters(count: int, config: RetrieveConfig, selector: Index) -> Index:
    if config.index == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=max(count, config.ef_search), sel=selector)
    return faiss.SearchParametersIVF(nprobe=config.num_probes or 1, sel=selector)
