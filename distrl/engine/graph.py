"""What a loss reaches, and one backward for several engines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def reach(total: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The same total, with a gradient of zero for the parameters that its graph does not hold.

    Ranks reduce gradients parameter by parameter: one missing on one rank would leave the others
    waiting, or pair the wrong ones.
    """
    reached = _leaves(total)
    for parameter in parameters:
        if id(parameter) not in reached:
            total = total + parameter.flatten()[:0].sum().to(total.dtype)
    return total


def _leaves(total: Tensor) -> set[int]:
    """Ids of the tensors that a backward from `total` would give a gradient."""
    leaves, seen, ahead = set(), set(), [total.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))  # pyright: ignore[reportAttributeAccessIssue]
        ahead.extend(before for before, _ in node.next_functions)
    return leaves


def with_gradients(
    total: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> Tensor:
    """The value of a total whose backward gives the parameters gradients that are known already.

    Several engines share one backward of the real graph that way: DeepSpeed wants one of its own
    for each, and a second one over the same graph would cost as much as the first.

    Args:
        total: A scalar; cut off from its graph.
        parameters: Of one engine.
        gradients: One a parameter; None stands for zero.
    """
    filled = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    return _WithGradients.apply(total.detach(), filled, *parameters)  # pyright: ignore[reportReturnType]


class _WithGradients(torch.autograd.Function):
    """The identity on its first argument."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        total: Tensor,
        gradients: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        scaled = (gradient * grads[0].to(gradient.dtype) for gradient in ctx.gradients)
        return (None, None, *scaled)
