"""The index that vectors are searched by: built, and its recall measured before it is used."""

import time

import numpy as np
from ray import ObjectRef

from distrl.data.ray_stage import Tasks
from distrl.errors import ConfigError
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.semantics.retrieve_tasks import (
    PartIndex,
    Vectors,
    build_index,
    measure_recall,
    nearest_in_piece,
    sampled,
)
from distrl.semantics.searched import Facts

ROUNDED = 5e-5
"""A recall among facts is that much off, at most."""


def indexed(
    vectors: Vectors, config: RetrieveConfig, tasks: Tasks, *, widen: bool
) -> tuple[Vectors, RetrieveConfig, Facts]:
    """The vectors with an index, how it is to be searched, and what was measured of it.

    Args:
        vectors: To be searched.
        config: Which index, and its knobs; resolved.
        tasks: Starts those of this run.
        widen: Whether an ivf index is probed in more cells where its recall is too low.

    Raises:
        ConfigError: If the recall is too low.
    """
    from distrl.semantics.ann import sample_size  # FAISS takes a second to load

    start = time.monotonic()
    trained_on = _sample(vectors, sample_size(config), tasks)
    cut = vectors.cut(config.vectors_per_index)
    builds = [tasks.of(build_index, config, vectors, some, trained_on) for some in cut]
    built = tasks.run(f"build {vectors.what} index", builds, _none)
    facts: Facts = {
        "indexes": len(built),
        "index_mb": round(sum(size for size, _ in built) / 1e6, 1),
        "index_s": round(time.monotonic() - start, 1),
    }
    indexes = [content for _, (content,) in built]
    vectors = vectors.with_indexes(list(map(PartIndex, indexes, cut)))
    config, measured = _with_recall(vectors, config, tasks, widen=widen)
    return vectors, config, facts | measured


def _sample(vectors: Vectors, wanted: int, tasks: Tasks) -> list[ObjectRef]:
    """References to queries evenly spread over all, about as many as wanted."""
    total = sum(vectors.sizes)
    numbers = np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(np.int64))
    launches = []
    for start, size, pool in zip(vectors.starts, vectors.sizes, vectors.pools, strict=True):
        rows = numbers[(numbers >= start) & (numbers < start + size)] - start
        launches.append(tasks.of(sampled, start, pool, rows))
    found = tasks.run(f"sample {vectors.what}", launches, int)
    return [references[0] for _, references in found]


def _with_recall(
    vectors: Vectors, config: RetrieveConfig, tasks: Tasks, *, widen: bool
) -> tuple[RetrieveConfig, Facts]:
    """How an index is to be searched, and its recall then.

    Raises:
        ConfigError: If it is too low.
    """
    what = vectors.what
    sample = _sample(vectors, config.recall_sample, tasks)
    launches = [
        tasks.of(nearest_in_piece, config, sample, start, pool)
        for start, pool in zip(vectors.starts, vectors.pools, strict=True)
    ]
    exact = tasks.run(f"exact {what} sample", launches, int)
    pieces = [references[0] for _, references in exact]
    while True:
        measure = tasks.of(measure_recall, config, vectors, sample, pieces)
        (((count, found), _),) = tasks.run(f"recall of {what} index", [measure], _first)
        wider = config.wider() if widen else None
        if found >= config.min_recall or wider is None:
            break
        tasks.say(
            f"{found:.3f} of the nearest {what} are found with num_probes={config.num_probes}, "
            f"min_recall is {config.min_recall}: {wider.num_probes} are tried"
        )
        config = wider
    if found < config.min_recall:
        raise _too_low(what, config, found, count)
    facts: Facts = {"recall_queries": count, "recall": round(found, 4)}
    if config.index == "ivf":
        facts["num_probes"] = config.num_probes or 0
    return config, facts


def _too_low(what: str, config: RetrieveConfig, found: float, count: int) -> ConfigError:
    advice = f"raise ef_search={config.ef_search} (num_links={config.num_links}), or"
    if config.index == "ivf":
        lists, probes = config.num_lists or 1, config.num_probes or 1
        all_of_them = f"num_probes={probes} is all of num_lists={lists}:"
        some = f"raise num_probes={probes} (num_lists={lists}) or leave it out, or"
        advice = all_of_them if probes >= lists else some
    return ConfigError(
        f"the {config.index} index finds {found:.3f} of the {config.num_neighbors} nearest {what} "
        f"of {count} queries, min_recall is {config.min_recall}: {advice} take index=exact"
    )


def _none(summary: object) -> int:
    return 0


def _first(measured: tuple[int, float]) -> int:
    return measured[0]
