"""What each of two processes runs: the diagnostics at ZeRO 3, where the last rank has no pairs.

Usage: python -m tests.unit.train.collapse_ranks OUT, with what torchrun would set.
"""

import json
import sys
from pathlib import Path

import torch

from distrl.engine.collectives import ensure_process_group, rank, world_size
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.train.collapse import CollapseProbe
from tests.parity.engine_methods import batches_of, cut, empty, make, shares_of
from tests.ranks import end_rank


def read_over(batches):
    """The diagnostics over all ranks of one batch a rank, then over one batch in one process."""
    torch.manual_seed(0)
    method = make("mclrec")
    config = EngineConfig(zero_stage=3, optimizer="sgd", lr=0.1)
    engines = Engines(
        method, config, device=torch.device("cpu"), micro_batch_size=4, num_workers=world_size()
    )
    probe = CollapseProbe(method, engines)
    for batch, step in probe.watched((batch, step) for step, batch in enumerate([batches[rank()]])):
        for phase in method.phases(0):
            engines.step(batch, phase, shares_of(batches)[rank()], step=step)
    found = probe.read()
    with engines.gathered():
        weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    return found, weights


def main(folder: Path) -> None:
    ensure_process_group("gloo")
    spread, _ = read_over(batches_of(0, 2))
    alone, weights = read_over([cut(0, 0, 7), empty()])
    nobody, _ = read_over([empty(), empty()])
    results = {"spread": spread, "alone": alone, "nobody": nobody}
    (folder / f"{rank()}.json").write_text(json.dumps(results))
    if rank() == 0:
        torch.save(weights, folder / "weights.pt")
    end_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
