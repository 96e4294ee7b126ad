"""SRA-CL's sample synthesizer. Dimensions: P prefixes, U neighbors, K of a prefix, E of texts."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distrl.nn.dropout import drop

NEGATIVE_SLOPE = 0.2
XAVIER_GAIN = 1.414


class Synthesizer(nn.Module):
    """How much each neighbor counts in the positive sample of a prefix, from their texts alone.

    e_j = LeakyReLU(a . [W q ; W c_j]), p = softmax over the neighbors of a prefix.

    Source: SRA-CL section 3.2 (arXiv:2503.04162) and its code: one map W for both sides and one
        vector a, no bias, no temperature; dropout falls on p, which is not scaled back to a sum of
        1 (code; the paper has none). `gatv2` is ours: e_j = a . LeakyReLU(V [q ; c_j]), in which
        the order of the neighbors can depend on the prefix (arXiv:2105.14491); in `gat` it cannot.
    """

    def __init__(
        self,
        *,
        text_size: int,
        hidden_size: int,
        score: Literal["gat", "gatv2"] = "gat",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.score, self.dropout = score, dropout
        inputs = text_size if score == "gat" else 2 * text_size
        self.project = nn.Linear(inputs, hidden_size, bias=False)
        self.attend = nn.Linear(2 * hidden_size if score == "gat" else hidden_size, 1, bias=False)
        for layer in (self.project, self.attend):
            nn.init.xavier_uniform_(layer.weight, gain=XAVIER_GAIN)

    def forward(
        self,
        text: Float[Tensor, "P E"],
        neighbor_text: Float[Tensor, "U E"],
        of_pair: Int64[Tensor, "P K"],
    ) -> Float[Tensor, "P K"]:
        """Weights of each prefix's neighbors; zero where it has fewer than K.

        Args:
            text: Of the prefixes.
            neighbor_text: Of the different neighbors.
            of_pair: Rows of `neighbor_text`, or -1.
        """
        is_missing_PK = of_pair < 0
        scores_PK = self._scores(text, neighbor_text, of_pair.clamp(min=0))
        # A prefix without any neighbor has no softmax; what it gets here is zeroed below.
        none_P1 = is_missing_PK.all(dim=1, keepdim=True)
        hidden_PK = is_missing_PK & ~none_P1
        weights_PK = scores_PK.masked_fill(hidden_PK, float("-inf")).softmax(dim=1)
        weights_PK = weights_PK.masked_fill(is_missing_PK, 0.0)
        return drop(weights_PK, self.dropout, training=self.training)

    def _scores(self, text: Tensor, neighbor_text: Tensor, at: Tensor) -> Float[Tensor, "P K"]:
        if self.score == "gat":
            # a . [q ; c] is a sum of two products, so no row of 2D is made for each pair.
            own, other = self.attend.weight.view(2, -1)
            own_P, other_U = self.project(text) @ own, self.project(neighbor_text) @ other
            return F.leaky_relu(own_P[:, None] + other_U[at], NEGATIVE_SLOPE)
        own_half, other_half = self.project.weight.chunk(2, dim=1)
        own_PD, other_UD = text @ own_half.T, neighbor_text @ other_half.T
        mixed_PKD = F.leaky_relu(own_PD[:, None] + other_UD[at], NEGATIVE_SLOPE)
        return self.attend(mixed_PKD).squeeze(-1)
