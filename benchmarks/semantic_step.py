"""What do SRA-CL's losses cost on top of their base? CPU time of a step, in turns.

    python -m benchmarks.semantic_step

Beauty with its table of neighbors (jobs/embed.py, jobs/retrieve.py), one thread, no Ray: CE-SASRec
alone, with either loss and with both, at 64 users a step, one prefix of each contrasted and 10
neighbors, and as configs/sracl/beauty.yaml has it. An epoch has as many steps with the losses as
without, so the ratio of steps is that of epochs. Beside it how many slots an encoder has to fill:
the authors' code pads each of 14 sequences a prefix. Without the table nothing is measured.
"""

import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from benchmarks.record import Record, Table, arguments
from distrl.config import RunConfig, load_config
from distrl.contract import Batch, Catalog, Method
from distrl.data.beside import read_beside
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash, read_manifest
from distrl.data.stream import local_batches
from distrl.errors import DistrlError
from distrl.methods import build

CONFIG = Path("configs/sracl/beauty.yaml")
PAPERS = ("data.contrasted_prefixes=1", "data.num_neighbors=10")
CASES = {
    "CE-SASRec": (*PAPERS, "method.inter_weight=0", "method.intra_weight=0"),
    "intra-user alone": (*PAPERS, "method.inter_weight=0"),
    "inter-user alone": (*PAPERS, "method.intra_weight=0"),
    "both": PAPERS,
    "both, 4 prefixes, 3 neighbors": ("data.contrasted_prefixes=4", "data.num_neighbors=3"),
    "the same, a random neighbor": (
        "data.contrasted_prefixes=4",
        "data.num_neighbors=3",
        "method.synthesizer=random",
    ),
}
PADDED_SEQUENCES = 14
"""Sequences of a prefix in a step of the authors' code, at 10 neighbors."""
ROW = 50
"""Slots of a padded sequence at this length; the authors cut to 20."""


def prepared(overrides: tuple[str, ...], count: int) -> tuple[Method, list[Batch]]:
    """A fresh method, and batches as its stream makes them.

    Raises:
        DistrlError: If the store or its table of neighbors is not there.
    """
    run = load_config(RunConfig, CONFIG, overrides)
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


def steps(method: Method, batches: list[Batch]) -> Callable[[], float]:
    """Takes a step on each batch; CPU milliseconds of one."""
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    alone = {"target": 1.0, "pair": 1.0}

    def run() -> float:
        start = time.process_time()
        for batch in batches:
            for phase in method.phases(0):
                optimizer.zero_grad()
                method(batch, phase).total(alone).backward()
                optimizer.step()
        return (time.process_time() - start) / len(batches) * 1e3

    return run


def filled(batches: list[Batch]) -> dict[str, float]:
    """Slots with an item, means a batch."""
    size = len(batches)
    found = [batch.neighbors for batch in batches if batch.neighbors is not None]
    return {
        "prefixes": sum(batch.num_pairs for batch in batches) / size,
        "clean": sum(int((batch.clean.segment >= 0).sum()) for batch in batches) / size,
        "neighbors": sum(len(one.sequences.last) for one in found) / size,
        "segments": sum(int(one.sequences.segment.max()) + 1 for one in found) / size,
        "neighbor slots": sum(int((one.sequences.segment >= 0).sum()) for one in found) / size,
    }


def main() -> int:
    """Measures, prints, writes."""
    args = arguments(__doc__).parse_args()
    record = Record("semantic_step", args)
    torch.set_num_threads(1)
    count, runs = (4, 1) if args.quick else (40, 5)
    try:
        made = {name: prepared(overrides, count) for name, overrides in CASES.items()}
    except DistrlError as error:
        record.note(f"Nothing was measured: {error}")
        record.write()
        return 0
    timed = {name: steps(*one) for name, one in made.items()}
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(runs):
        for name, run in timed.items():
            found[name].append(run())
    base = median(found["CE-SASRec"])
    rows = [
        (name, median(times), min(times), max(times), f"{median(times) / base:.1f} x")
        for name, times in found.items()
    ]
    record.figures["cpu_ms_a_step"] = found
    record.figures["slots"] = filled(made["both"][1])
    slots = record.figures["slots"]
    padded = slots["prefixes"] * PADDED_SEQUENCES * ROW
    record.note(
        f"{slots['prefixes']:.0f} prefixes a step have {slots['neighbors']:.0f} different "
        f"neighbors in {slots['segments']:.0f} segments of {slots['neighbor slots']:,.0f} items; "
        f"14 padded sequences a prefix would be {padded:,.0f} slots."
    )
    header = ("losses", "CPU ms a step", "least", "most", "of CE-SASRec")
    record.table(Table(f"{runs} runs of {count} steps in turns, one thread", header, rows))
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
