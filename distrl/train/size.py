"""How much memory a run's parameters take, told before anything is trained."""

import math
from collections.abc import Mapping, Sequence

import torch

from distrl.cluster import room_for
from distrl.config import RunConfig
from distrl.contract import Catalog
from distrl.methods import build

BYTES_A_PARAMETER = {"fp32": 32, "bf16": 36}
"""At the peak of a step, of which the next item's loss and DeepSpeed's copies are a good part:
what `python -m benchmarks.worker_memory` measures with one worker and Adam, rounded up. More
workers share some of it; batches come on top."""


def parameters_of_parts(run: RunConfig, num_items: int) -> dict[str, int]:
    """How many parameters each part of the method moves, over a catalog of so many items."""
    with torch.device("meta"):
        method = build(run.method, Catalog(num_items, run.data.max_len))
    return {
        name: sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        for name, part in method.parts.items()
    }


def size_lines(
    run: RunConfig,
    num_items: int,
    each_worker: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]],
) -> list[str]:
    """What to tell the user of the model's size: one line, and a warning where nodes lack memory.

    Args:
        run: The run.
        num_items: Of the catalog.
        each_worker: Ray resources of a training worker.
        nodes: As `live_nodes` gives; Ray says of each how much memory its workers may take. What a
            GPU has it does not say, so of those there is no warning.
    """
    parts = parameters_of_parts(run, num_items)
    needed = BYTES_A_PARAMETER[run.engine.precision] * sum(parts.values())
    listed = ", ".join(f"{name} {_number(count)}" for name, count in parts.items())
    lines = [f"parameters: {listed}; up to {_amount(needed)} of memory on each worker"]
    wanted = min(run.workers.num_workers, room_for(each_worker, nodes))
    room = room_for({**each_worker, "memory": needed}, nodes)
    if not run.workers.use_gpu and room < wanted:
        most = max((node.get("memory", 0.0) for node in nodes), default=0.0)
        lines.append(
            f"warning: nodes have memory for {room} such workers, this run has "
            f"{run.workers.num_workers} (the largest node has {_amount(most)} for them): Ray ends "
            "workers whose node runs out; larger nodes, a smaller method.hidden_size or fewer "
            "items (k_core.min_item_interactions of jobs/prepare.py) need less"
        )
    return lines


def _number(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def _amount(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{math.ceil(num_bytes / 1e6)} MB"
