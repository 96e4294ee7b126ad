"""How much memory does a parameter take on a worker? Bytes, in a process a case.

    python -m benchmarks.worker_memory

One worker, batches of 8 users, catalogs so large that parameters are nearly all that there is. What
`distrl.train.size` tells users before a run must not be less.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Record, Table, arguments
from distrl.config import RunConfig, load_config
from distrl.contract import Catalog
from distrl.data.samples import BatchMaker, Samples
from distrl.engine.collectives import ensure_process_group
from distrl.engine.zero import Engines
from distrl.methods import build
from distrl.ops.ragged import Ragged
from distrl.train.size import BYTES_A_PARAMETER

CASES = (
    ("sasrec", 1, "fp32"),
    ("sasrec", 2, "fp32"),
    ("sasrec", 3, "fp32"),
    ("sasrec", 1, "bf16"),
    ("sasrec", 3, "bf16"),
    ("cl4srec", 1, "fp32"),
    ("mclrec", 1, "fp32"),
    ("laclrec", 1, "fp32"),
    ("gru4rec", 1, "fp32"),
)
USERS, LENGTH = 8, 9


def resting() -> int:
    """Bytes that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def engines_of(run: RunConfig, num_items: int) -> Engines:
    """The method over a catalog, wrapped for one worker."""
    method = build(run.method, Catalog(num_items, run.data.max_len)).train()
    device = torch.device("cpu")
    return Engines(method, run.engine, device=device, micro_batch_size=USERS, num_workers=1)


def measure(name: str, stage: int, precision: str, num_items: int) -> dict[str, float]:
    """Bytes a parameter once a step is done, and at the peak of steps; in a process of its own."""
    settings = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    if name != "gru4rec":
        settings.append("method.products=fp32")
    run = load_config(RunConfig, Path(f"configs/{name}/beauty.yaml"), settings)
    ensure_process_group("gloo")
    engines_of(run, 10)  # what libraries take is there before the first look
    before = resting()
    engines = engines_of(run, num_items)
    method, random = engines.method, np.random.default_rng(0)
    rows = [random.integers(1, num_items + 1, LENGTH).tolist() for _ in range(USERS)]
    none = np.zeros(USERS, dtype=np.int64)
    maker = BatchMaker.of(run.data, method, num_items, run.seed)
    batch = maker.make(Samples(none, none, np.arange(USERS), Ragged.of(rows)))
    alone = dict.fromkeys(("target", "pair", "token", "missing", "sum"), 1.0)
    last = run.training.epochs - 1
    for step, epoch in enumerate((0, 0, last, last)):
        for phase in method.phases(epoch):
            engines.step(batch, phase, alone, step=step)
    count = sum(parameter.numel() for parameter in engines.parameters())
    if stage == 3:
        count = sum(p.ds_numel for p in engines.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "parameters": count,
        "resting": (resting() - before) / count,
        "peak": (peak - before) / count,
    }


def measured_apart(case: tuple[str, int, str], num_items: int) -> dict[str, float]:
    """The same, from a child: a peak is of a process's whole life."""
    command = [sys.executable, "-m", "benchmarks.worker_memory", "--case", *map(str, case)]
    done = subprocess.run(
        [*command, "--items", str(num_items)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measures, prints, writes."""
    parser = arguments(__doc__)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--items", type=int, help="of the catalog; default 500,000")
    args = parser.parse_args()
    num_items = args.items or (100_000 if args.quick else 500_000)
    if args.case:
        name, stage, precision = args.case
        print(json.dumps(measure(name, int(stage), precision, num_items)))
        return 0
    record = Record("worker_memory", args)
    rows = []
    for case in CASES[:1] if args.quick else CASES:
        found = measured_apart(case, num_items)
        told = BYTES_A_PARAMETER[case[2]]
        record.figures[" ".join(map(str, case))] = found | {"told": told}
        rows.append((*case, found["parameters"] / 1e6, found["resting"], found["peak"], told))
    header = ("method", "ZeRO stage", "precision", "M parameters", "resting", "peak", "told")
    record.table(Table(f"Bytes a parameter, {num_items:,} items, one worker", header, rows))
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
