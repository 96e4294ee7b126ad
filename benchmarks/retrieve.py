"""How fast are neighbors found among a million vectors, and how many of them does an index find?

    python -m benchmarks.retrieve           # exact and IVF, some two minutes
    python -m benchmarks.retrieve --hnsw    # HNSW too, 25 minutes more

What a task of jobs/retrieve.py runs, without Ray: `distrl.semantics.nearest` over all vectors, and
an index of `distrl.semantics.ann` with the neighbors ranked exactly afterwards. Only a sample
of the vectors is searched for; the time for all is the sample's, extrapolated, as each query costs
the same. Vectors are generated in clusters with random spread. One thread, whose CPU time is taken,
as others' work on the machine does not count in it. Peak memory is the process's own, reset before
each step, and includes the vectors.
"""

import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.record import Record, Table, arguments
from distrl.semantics.ann import build, candidates, from_bytes, sample_size, to_bytes
from distrl.semantics.nearest import Best, Pool, Queries, among, directions_of, nearest, recall
from distrl.semantics.retrieve_config import RetrieveConfig

NUM_VECTORS, QUICK_VECTORS, DIMENSION = 1_000_000, 20_000, 384
VECTORS_A_CLUSTER, LATENT, SPREADS = 50, 32, (0.7, 1.0)
"""Clusters lie in fewer dimensions than the vectors have, as texts' vectors do, and overlap, the
more the wider a spread in units of the centers' own."""
NEIGHBORS, QUERIES = 10, 500
DIALS = {"ivf": ("num_probes", (16, 62, 250)), "hnsw": ("ef_search", (64, 256, 1024))}
"""What a search of each index turns between fast and complete."""
PIECES, BLOCK_BYTES = 8, 64 << 20

T = TypeVar("T")
Kind = Literal["ivf", "hnsw"]


def generate(count: int, spread: float) -> Pool:
    """Vectors around cluster centers, each of a group of its own."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((LATENT, DIMENSION), dtype=np.float32)
    centers = rng.standard_normal((max(count // VECTORS_A_CLUSTER, 1), LATENT), dtype=np.float32)
    vectors = np.empty((count, DIMENSION), np.float16)
    for low in range(0, count, 1 << 15):
        here = vectors[low : low + (1 << 15)]
        which = rng.integers(0, len(centers), len(here))
        latent = centers[which] + spread * rng.standard_normal(
            (len(here), LATENT), dtype=np.float32
        )
        noise = rng.standard_normal((len(here), DIMENSION), dtype=np.float32)
        here[:] = (latent @ base + noise) / (LATENT * DIMENSION) ** 0.5
    return Pool(vectors, np.arange(count), np.ones(count, bool))


def read(pool: Pool) -> None:
    """What exact search does to all vectors once, whatever the number of queries."""
    for low in range(0, len(pool.groups), 4096):
        directions_of(pool.vectors[low : low + 4096])


def measured(step: Callable[[], T]) -> tuple[T, float, float]:
    """What a step gives, its CPU seconds, and the process's peak memory in GB meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    found = step()
    took_s = time.process_time() - start
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return found, took_s, int(peak.split()[1]) * 1024 / 1e9


def main() -> int:
    """Measures, prints, writes."""
    parser = arguments(__doc__)
    parser.add_argument("--hnsw", action="store_true", help="an HNSW index as well")
    args = parser.parse_args()
    record = Record("retrieve", args)
    indexes: tuple[Kind, ...] = ("ivf", "hnsw") if args.hnsw or args.quick else ("ivf",)
    with threadpool_limits(1):
        for spread in SPREADS:
            measure(record, QUICK_VECTORS if args.quick else NUM_VECTORS, spread, indexes)
    record.note(
        f"Generated vectors of {DIMENSION} float16 in clusters of about {VECTORS_A_CLUSTER}; "
        f"{NEIGHBORS} neighbors, {QUERIES} queries spread over all, one thread. CPU hours for all "
        "vectors are extrapolated, not measured: by the number of queries, but for the reading of "
        "all vectors, which exact search does once for the 32,768 queries of a task. An index is "
        "as large as its vectors, with HNSW's links some 270 bytes a vector more, and is read "
        "where it lies."
    )
    record.write()
    return 0


def measure(record: Record, count: int, spread: float, indexes: Sequence[Kind]) -> None:
    """All steps over so many vectors."""
    figures = record.figures[f"spread {spread}"] = {}
    pool, took_s, peak_gb = measured(lambda: generate(count, spread))
    figures["vectors_gb"] = pool.vectors.nbytes / 1e9
    bounds = np.linspace(0, count, PIECES + 1).astype(int).tolist()
    pieces = [(low, Pool(*(part[low:high] for part in pool))) for low, high in pairwise(bounds)]
    queries = Queries.of(pool, 0, np.linspace(0, count - 1, QUERIES).astype(int))
    rows: list[Sequence[Any]] = [("generate", took_s, "", "", "", peak_gb)]
    _, read_s, peak_gb = measured(lambda: read(pool))
    rows.append(("read all", read_s, "", "", "", peak_gb))
    figures["read_cpu_s"] = read_s
    exact, took_s, peak_gb = measured(lambda: nearest(queries, pieces, NEIGHBORS, BLOCK_BYTES))
    # Exact search reads all vectors once a task, however many queries that has.
    tasks_s = read_s * count / configured("ivf", count).queries_per_task
    hours = (tasks_s + (took_s - read_s) / QUERIES * count) / 3600
    rows.append(searched(figures, "exact", took_s, hours, None, peak_gb))
    for kind in indexes:
        rows += with_index(figures, configured(kind, count), pool, pieces, queries, exact)
    header = ("step", "CPU s", "queries/CPU s", "CPU hours for all", "recall@10", "peak GB")
    title = f"Neighbors of {QUERIES:,} of {count:,} vectors in clusters of spread {spread}"
    record.table(Table(title, header, rows))


def configured(kind: Kind, count: int) -> RetrieveConfig:
    """The job's defaults for so many vectors."""
    return RetrieveConfig(store_uri="-", embeddings="-", index=kind).resolved(count)


def searched(
    figures: dict[str, Any],
    step: str,
    took_s: float,
    hours: float,
    found: float | None,
    peak_gb: float,
) -> Sequence[Any]:
    """A row of the table; the same in the figures."""
    figures[step] = {
        "sample_cpu_s": took_s,
        "queries_per_cpu_s": QUERIES / took_s,
        "all_cpu_hours_extrapolated": hours,
        "recall_at_10": found,
        "peak_gb": peak_gb,
    }
    share = "" if found is None else f"{found:.4f}"
    return (step, took_s, QUERIES / took_s, hours, share, peak_gb)


def with_index(
    figures: dict[str, Any],
    config: RetrieveConfig,
    pool: Pool,
    pieces: list[tuple[int, Pool]],
    queries: Queries,
    exact: Best,
) -> list[Sequence[Any]]:
    """Rows of one index: its building, and its searches from fast to complete."""
    count = len(pool.groups)
    trained_on = np.linspace(0, count - 1, min(sample_size(config), count)).astype(int)
    index, took_s, peak_gb = measured(
        lambda: build(pieces, directions_of(pool.vectors[trained_on]), config)
    )
    content = to_bytes(index)
    del index
    figures[f"build {config.index}"] = {
        **config.knobs,
        "trained_on": len(trained_on),
        "build_cpu_s": took_s,
        "peak_gb": peak_gb,
        "index_gb": content.nbytes / 1e9,
    }
    rows: list[Sequence[Any]] = [(f"{config.index}, build", took_s, "", "", "", peak_gb)]
    opened = from_bytes(content)
    dial, settings = DIALS[config.index]
    for setting in settings:
        turned = config.model_copy(update={dial: setting})
        found, took_s, peak_gb = measured(
            lambda turned=turned: among(
                queries, candidates(opened, queries, turned), pieces, NEIGHBORS
            )
        )
        hours = took_s / QUERIES * count / 3600
        step = f"{config.index}, {dial}={setting}"
        rows.append(searched(figures, step, took_s, hours, recall(found, exact), peak_gb))
    return rows


if __name__ == "__main__":
    sys.exit(main())
