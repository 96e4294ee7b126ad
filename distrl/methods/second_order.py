"""One unrolled step of gradient descent: weights as functions of what its loss depends on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distrl.contract import Packed


def detached_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights as leaves of a graph of their own, whether or not it is being trained."""
    return {name: weight.detach().requires_grad_() for name, weight in module.named_parameters()}


def called_with(
    encoder: nn.Module, weights: Mapping[str, Tensor]
) -> Callable[[Packed, Tensor], Tensor]:
    """The encoder as it would be with other weights, in operations that differentiate twice."""

    def run(packed: Packed, at: Tensor) -> Tensor:
        # Of attention's kernels only the plain one has a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(encoder, dict(weights), (packed, at))

    return run


def stepped(
    weights: Mapping[str, Tensor], *, fixed: Tensor, learned: Tensor | None, lr: float
) -> dict[str, Tensor]:
    """Weights after one step of plain gradient descent on `fixed + learned`.

    Source: the one-step unrolling of MAML (arXiv:1703.03400) and MAXL (arXiv:1901.08933), which
        MCLRec cites and whose gradient neither its paper nor its code takes.

    Args:
        weights: Leaves that both losses were computed with.
        fixed: The loss on which nothing outside the weights has a say.
        learned: The loss that other parameters have a say in: their gradient flows through this
            step. None leaves it out.
        lr: Learning rate of the step.

    Returns:
        By name, a graph of the parameters behind `learned`; the weights themselves are constants.
    """
    leaves = list(weights.values())
    steps = torch.autograd.grad(fixed, leaves, retain_graph=True)
    if learned is not None:
        through = torch.autograd.grad(learned, leaves, create_graph=True, materialize_grads=True)
        steps = [a + b for a, b in zip(steps, through, strict=True)]
    return {
        name: weight.detach() - lr * step
        for (name, weight), step in zip(weights.items(), steps, strict=True)
    }
