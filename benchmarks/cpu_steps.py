"""CPU time of training steps over batches that are there already, one alternative after another."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from benchmarks.record import Table
from distrl.config import RunConfig, load_config
from distrl.contract import Batch, Catalog, Method
from distrl.data.beside import read_beside
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash, read_manifest
from distrl.data.stream import local_batches
from distrl.methods import build


def prepared(config: Path, overrides: Sequence[str], count: int) -> tuple[Method, list[Batch]]:
    """A fresh method, and batches as its stream makes them.

    Raises:
        DistrlError: If the store or a table beside it is not there.
    """
    run = load_config(RunConfig, config, overrides)
    manifest = read_manifest(run.data.store_uri)
    beside = read_beside(run.data, manifest)
    torch.manual_seed(0)
    method = build(run.method, Catalog(manifest.num_items, run.data.max_len)).train()
    maker = BatchMaker.of(run.data, method, manifest.num_items, run.seed, beside)
    ledger = Ledger(manifest_hash(manifest))
    stream = local_batches(manifest, run.data, maker, epochs=1, ledger=ledger)
    try:
        return method, [batch for batch, _ in islice(stream, count)]
    finally:
        stream.close()


def steps(method: Method, batches: list[Batch], epoch: int = 0) -> Callable[[], float]:
    """Takes a step of an epoch on each batch; CPU milliseconds of one."""
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    alone = {"target": 1.0, "pair": 1.0, "token": 1.0, "missing": 1.0, "sum": 1.0}

    def run() -> float:
        start = time.process_time()
        for batch in batches:
            for phase in method.phases(epoch):
                optimizer.zero_grad()
                method(batch, phase).total(alone).backward()
                optimizer.step()
        return (time.process_time() - start) / len(batches) * 1e3

    return run


def in_turns(
    alternatives: Mapping[str, Callable[[], float]], runs: int, *, count: int, of: str
) -> tuple[dict[str, list[float]], Table]:
    """What each alternative took in each run, and a table with ratios to the one named `of`."""
    found: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(runs):
        for name, run in alternatives.items():
            found[name].append(run())
    base = median(found[of])
    rows = [
        (name, median(times), min(times), max(times), f"{median(times) / base:.1f} x")
        for name, times in found.items()
    ]
    header = ("step", "CPU ms", "least", "most", f"of {of}")
    return found, Table(f"{runs} runs of {count} steps in turns, one thread", header, rows)
