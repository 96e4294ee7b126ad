"""Learned augmentations of a sequence's state. Dimensions: B sequences, D hidden."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MLPAugmenter(nn.Module):
    """A bottleneck MLP from one state to a learned view of it.

    Source: MCLRec section 3.2 says "3-layer MLPs". The sizes 64-32-16-64, the exact GELU and the
        division by the L2 norm are the authors' code, as is torch's default initialization. We add
        the epsilon 1e-12 to the norm that the code leaves out.
    """

    def __init__(
        self, *, hidden_size: int, bottleneck: Sequence[int] = (32, 16), normalize: bool = True
    ) -> None:
        super().__init__()
        sizes = [hidden_size, *bottleneck, hidden_size]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.normalize = normalize

    def forward(self, states: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The learned views, of norm 1 where `normalize` is set."""
        *inner, outer = self.layers
        for layer in inner:
            states = F.gelu(layer(states))
        views = outer(states)
        return F.normalize(views, dim=1) if self.normalize else views
