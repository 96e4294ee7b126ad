"""Dropout whose draws do not cost more than the layer they fall on.

torch draws one 32-bit number an element on one CPU thread, which took a third of a training step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16
_DRAWS_PER_WORD = 4


def keep_mask(shape: torch.Size, dropped: float) -> Tensor:
    """Which elements stay, from torch's generator: 16 bits a draw, four draws a word.

    Args:
        shape: Of the mask.
        dropped: Share of elements that go, rounded to the nearest multiple of 2**-16.
    """
    words = -(-shape.numel() // _DRAWS_PER_WORD)
    draws = torch.empty(words, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (draws[: shape.numel()] >= _threshold(dropped) - _LEVELS // 2).view(shape)


def _threshold(dropped: float) -> int:
    return round(dropped * _LEVELS)


def drop(values: Tensor, dropped: float, *, training: bool) -> Tensor:
    """Zeroes a share of the elements and scales the others up, so that means stay.

    Args:
        values: Of any shape.
        dropped: Share of elements that go, below 1; on a CPU a multiple of 2**-16.
        training: Otherwise nothing happens.
    """
    if not training or dropped == 0.0:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, dropped)
    scale = _LEVELS / (_LEVELS - _threshold(dropped))
    return values * keep_mask(values.shape, dropped).to(values.dtype).mul_(scale)


class Dropout(nn.Module):
    """`drop` as a layer."""

    def __init__(self, dropped: float) -> None:
        super().__init__()
        self.dropped = dropped

    def forward(self, values: Tensor) -> Tensor:
        """Zeroes a share of the elements while training."""
        return drop(values, self.dropped, training=self.training)
