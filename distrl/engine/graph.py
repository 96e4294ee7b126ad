"""What a loss reaches."""

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
