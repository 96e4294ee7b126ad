"""Fused linear cross entropies: our chunks, Liger's and cut-cross-entropy's, where installed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distrl.ops.losses import next_item_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From states (T D), table (V D) and targets (T) to a mean in nats."""


def losses() -> tuple[dict[str, Loss], list[str]]:
    """What can be compared here, by name, and a line for each that cannot."""
    found: dict[str, Loss] = {
        "distrl, chunks": lambda states, table, targets: next_item_loss(
            states, table, targets, products="bf16"
        ),
        "torch, all logits": lambda states, table, targets: F.cross_entropy(
            (states @ table.T).float(), targets
        ),
    }
    lacking = []
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda states, table, targets: liger(table, states, targets)
    except ImportError:
        lacking.append("Liger's fused linear cross entropy: liger-kernel is not installed")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda states, table, targets: linear_cross_entropy(
            states, table, targets
        )
    except ImportError:
        lacking.append("cut-cross-entropy is not installed")
    return found, lacking


def forward_backward(loss: Loss, targets: int, items: int, hidden: int, device: str) -> Callable:
    """One evaluation of a loss and both its gradients, in bf16."""
    kind = {"device": device, "dtype": torch.bfloat16}
    states = torch.randn(targets, hidden, **kind).mul_(0.1).requires_grad_()
    table = torch.randn(items, hidden, **kind).mul_(0.1).requires_grad_()
    wanted = torch.randint(1, items, (targets,), device=device)

    def run() -> None:
        states.grad = table.grad = None
        loss(states, table, wanted).backward()

    return run
