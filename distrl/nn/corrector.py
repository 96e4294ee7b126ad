"""What mends a damaged sequence: one operation a slot, and the items missing in front of it.

Dimensions: A anchors, K items at most in a gap, D hidden, V items.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distrl.nn.dropout import Dropout
from distrl.nn.encoder import INIT_STD, EncoderLayer
from distrl.schema import PAD_ID

END = PAD_ID
"""Class of the generator that ends a gap; PAD's row of the item table, which is never generated,
gives way to it."""

_SCORES_AT_ONCE = 16 * 2**20
"""Scores alive at once while generating."""


class Corrector(nn.Module):
    """The operation head and the reverse generator of LACLRec's augmenter.

    Both read the states of an encoder that is not part of this module, and the generator shares
    the item vectors with it. The generator is one causal block over a state, then the items it has
    placed so far, from the slot backwards.

    Source: the code of TCLARec (github anonymityww/TCLA), sections 3 and 4 of its reading. There
        the end has a row of the item table and the places are those of the encoder; here both are
        this module's own, so that the encoder stays the one that the other methods have.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int,
        num_heads: int,
        dropout: float,
        attention_dropout: float,
        max_inserted: int,
    ) -> None:
        super().__init__()
        self.max_inserted = max_inserted
        self.operation = nn.Linear(hidden_size, 3)
        self.end = nn.Parameter(torch.empty(1, hidden_size))
        self.places = nn.Embedding(max_inserted, hidden_size)
        self.dropout = Dropout(dropout)
        self.block = EncoderLayer(
            hidden_size=hidden_size,
            inner_size=inner_size,
            num_heads=num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.end, std=INIT_STD)

    def classes(self, item_vectors: Float[Tensor, "V1 D"]) -> Float[Tensor, "V1 D"]:
        """What the generator chooses from: the end in the row of PAD, then the items."""
        return torch.cat([self.end, item_vectors[1:]])

    def forward(
        self,
        states: Float[Tensor, "A D"],
        placed: Float[Tensor, "A J D"],
        added: Int64[Tensor, " J1"] | None = None,
    ) -> Float[Tensor, "A J1 D"]:
        """States that score the item at each place of a gap, given those nearer to the slot.

        Args:
            states: Of the slots in front of which items are missing.
            placed: Vectors of the items at the first J < K places, the nearest first.
            added: How often each place's own vector is added; None adds each once.
        """
        tokens = torch.cat([states[:, None], placed], dim=1)
        length = tokens.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        places_JD = self.places.weight[:length]
        if added is not None:
            places_JD = places_JD * added[:, None]
        tokens = self.dropout(tokens + places_JD)
        return self.block(tokens, visible[None, None].expand(len(tokens), 1, -1, -1))

    @torch.no_grad()
    def generate(
        self,
        states: Float[Tensor, "A D"],
        item_vectors: Float[Tensor, "V1 D"],
        *,
        places_added: Literal["once", "each_step"] = "once",
    ) -> Int64[Tensor, "A K"]:
        """The likeliest item of each place, one after the other; PAD_ID from the end on.

        Args:
            states: Of the slots in front of which items are missing.
            item_vectors: Row by item id.
            places_added: each_step adds the places again at every step to what has them already,
                as the code of TCLARec and of STEAM does, unlike in training.
        """
        found = torch.full((len(states), self.max_inserted), PAD_ID, device=states.device)
        classes = self.classes(item_vectors)
        open_ = torch.arange(len(states), device=states.device)
        for place in range(self.max_inserted):
            added = None
            if places_added == "each_step":
                added = torch.arange(place + 1, 0, -1, device=states.device)
            scored = self(states[open_], item_vectors[found[open_, :place]], added)[:, -1]
            rows = max(_SCORES_AT_ONCE // len(classes), 1)
            chosen = [(some @ classes.T).argmax(dim=1) for some in scored.split(rows)]
            found[open_, place] = torch.cat(chosen) if chosen else found[open_, place]
            open_ = open_[found[open_, place] != END]
        return found
