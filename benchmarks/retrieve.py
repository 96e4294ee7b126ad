"""How fast are neighbors found among a million vectors, and how many of them does an index find?

    python -m benchmarks.retrieve

What a task of jobs/retrieve.py runs, without Ray: `distrl.semantics.nearest` over all vectors, and
an IVF index of `distrl.semantics.ann` with the neighbors ranked exactly afterwards. Only a sample
of the vectors is searched for; the time for all is the sample's, extrapolated, as each query costs
the same. Vectors are generated in clusters with random spread. One thread, whose CPU time is taken,
as others' work on the machine does not count in it. Peak memory is the process's own, reset before
each step, and includes the vectors.
"""

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.record import Record, Table, arguments
from distrl.semantics.ann import build, candidates, from_bytes, sample_size, to_bytes
from distrl.semantics.nearest import Pool, Queries, among, directions_of, nearest, recall
from distrl.semantics.retrieve_config import RetrieveConfig

NUM_VECTORS, QUICK_VECTORS, DIMENSION = 1_000_000, 20_000, 384
VECTORS_A_CLUSTER, LATENT, SPREADS = 50, 32, (0.7, 1.0)
"""Clusters lie in fewer dimensions than the vectors have, as texts' vectors do, and overlap, the
more the wider a spread in units of the centers' own."""
NEIGHBORS, QUERIES, PROBES = 10, 500, (16, 62, 250)
PIECES, BLOCK_BYTES = 8, 64 << 20

T = TypeVar("T")


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
    args = arguments(__doc__).parse_args()
    record = Record("retrieve", args)
    with threadpool_limits(1):
        for spread in SPREADS:
            measure(record, QUICK_VECTORS if args.quick else NUM_VECTORS, spread)
    record.note(
        f"Generated vectors of {DIMENSION} float16 in clusters of about {VECTORS_A_CLUSTER}; "
        f"{NEIGHBORS} neighbors, {QUERIES} queries spread over all, one thread. CPU hours for all "
        "vectors are extrapolated, not measured: by the number of queries, but for the reading of "
        "all vectors, which exact search does once for the 32,768 queries of a task. An index is "
        "as large as its vectors and is read where it lies."
    )
    record.write()
    return 0


def measure(record: Record, count: int, spread: float) -> None:
    """All steps over so many vectors."""
    figures = record.figures[f"spread {spread}"] = {}
    pool, took_s, peak_gb = measured(lambda: generate(count, spread))
    bounds = np.linspace(0, count, PIECES + 1).astype(int).tolist()
    pieces = [(low, Pool(*(part[low:high] for part in pool))) for low, high in pairwise(bounds)]
    rows_asked = np.linspace(0, count - 1, QUERIES).astype(int)
    queries = Queries.of(pool, 0, rows_asked)
    rows = [("generate", took_s, "", "", "", peak_gb)]

    def add(step: str, took_s: float, peak_gb: float, found: float | None) -> None:
        # Exact search reads all vectors once a task, however many queries that has.
        shared_s = read_s if step == "exact" else 0
        tasks_s = shared_s * count / config.queries_per_task
        hours = (tasks_s + (took_s - shared_s) / QUERIES * count) / 3600
        found_share = "" if found is None else f"{found:.4f}"
        rows.append((step, took_s, QUERIES / took_s, hours, found_share, peak_gb))
        figures[step] = {
            "sample_cpu_s": took_s,
            "queries_per_cpu_s": QUERIES / took_s,
            "all_cpu_hours_extrapolated": hours,
            "recall_at_10": found,
            "peak_gb": peak_gb,
        }

    config = RetrieveConfig(store_uri="-", embeddings="-", index="ivf").resolved(count)
    _, read_s, peak_gb = measured(lambda: read(pool))
    rows.append(("read all", read_s, "", "", "", peak_gb))
    figures["read_cpu_s"] = read_s
    exact, took_s, peak_gb = measured(lambda: nearest(queries, pieces, NEIGHBORS, BLOCK_BYTES))
    add("exact", took_s, peak_gb, None)
    trained_on = np.linspace(0, count - 1, min(sample_size(config), count)).astype(int)
    index, took_s, peak_gb = measured(
        lambda: build(pieces, directions_of(pool.vectors[trained_on]), config)
    )
    rows.append((f"ivf of {config.num_lists} cells, build", took_s, "", "", "", peak_gb))
    figures["build"] = {
        "num_lists": config.num_lists,
        "trained_on": len(trained_on),
        "build_cpu_s": took_s,
        "peak_gb": peak_gb,
    }
    content = to_bytes(index)
    del index
    opened = from_bytes(content)
    figures["build"]["index_gb"] = content.nbytes / 1e9
    for probes in PROBES:
        probed = config.model_copy(update={"num_probes": probes})
        found, took_s, peak_gb = measured(
            lambda probed=probed: among(
                queries, candidates(opened, queries, probed), pieces, NEIGHBORS
            )
        )
        add(f"ivf, {probes} probes", took_s, peak_gb, recall(found, exact))
    header = ("step", "CPU s", "queries/CPU s", "CPU hours for all", "recall@10", "peak GB")
    title = f"Neighbors of {QUERIES:,} of {count:,} vectors in clusters of spread {spread}"
    record.table(Table(title, header, rows))
    figures["vectors_gb"] = pool.vectors.nbytes / 1e9


if __name__ == "__main__":
    sys.exit(main())
