"""The SASRec-style encoder.

Dimensions: R packed rows of L slots, S segments, A slots asked for, D hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distrl.contract import Packed
from distrl.nn.attention import attend, visible_keys
from distrl.nn.dropout import Dropout
from distrl.schema import PAD_ID

INIT_STD = 0.02
LAYER_NORM_EPS = 1e-12


class EncoderLayer(nn.Module):
    """One post-norm transformer block: attention, then a feed-forward network with GELU."""

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int,
        num_heads: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.inner_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(dropout)

    def forward(
        self, states: Float[Tensor, "R L D"], visible: Tensor, at: Tensor | None = None
    ) -> Tensor:
        """States after one block, each looking only where `visible` (R 1 L L) allows.

        Args:
            states: Before the block.
            visible: See `visible_keys`.
            at: Flat indices of slots; only their states are made then, as rows (A D).
        """
        mixed = self._mixed(states, visible)
        if at is not None:
            states, mixed = states.flatten(0, 1)[at], mixed.flatten(0, 1)[at]
        states = self.attention_norm(states + self.dropout(self.output(mixed)))
        return self.inner_norm(states + self.dropout(self.outer(F.gelu(self.inner(states)))))

    def _mixed(self, states: Tensor, visible: Tensor) -> Float[Tensor, "R L D"]:
        """What each slot takes from the slots it sees, all heads side by side."""
        R, L, D = states.shape
        split = self.query_key_value(states).view(R, L, 3, self.num_heads, D // self.num_heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        drop = self.attention_dropout if self.training else 0.0
        return attend(query, key, value, visible, dropout=drop).transpose(1, 2).reshape(R, L, D)


class SequenceEncoder(nn.Module):
    """SASRec's transformer as MCLRec's authors build it; one state a slot.

    Source: MCLRec section 3.1 and its code: post-norm blocks, exact GELU, learned positions counted
        from the oldest item, layer norm and dropout after the embedding sum, no scaling by sqrt(D),
        no final norm, weights from N(0, 0.02), PAD's row too. The table has a row for PAD (0), for
        the items 1..V, and for a mask token (V + 1), which the authors allocate and never use.
    """

    def __init__(
        self,
        *,
        num_items: int,
        max_len: int,
        hidden_size: int = 64,
        inner_size: int = 256,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.5,
        attention_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.item_table = nn.Embedding(num_items + 2, hidden_size)
        self.positions = nn.Embedding(max_len, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(
                hidden_size=hidden_size,
                inner_size=inner_size,
                num_heads=num_heads,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(num_layers)
        )
        self.apply(_init)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """Rows of PAD and the items 0..V, without the mask token's."""
        return self.item_table.weight[: self.num_items + 1]

    def forward(
        self, packed: Packed, at: Int64[Tensor, " A"] | None = None, *, causal: bool = True
    ) -> Tensor:
        """One state a slot; a state knows its own segment up to its own position, and no more.

        Args:
            packed: The sequences.
            at: Flat indices of slots; only their states are made then, as rows (A D), which saves
                most of the last block. None makes all states (R L D).
            causal: Otherwise a state knows the whole of its segment.
        """
        embedded_RLD = self.item_table(packed.items) + self.positions(packed.position)
        states = self.dropout(self.norm(embedded_RLD))
        visible = visible_keys(packed, causal=causal)
        *lower, upper = self.layers
        for layer in lower:
            states = layer(states, visible)
        return upper(states, visible, at)

    def last_states(self, packed: Packed) -> Float[Tensor, "S D"]:
        """The state of each segment's newest slot."""
        return self(packed, packed.last)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def stack(packs: Sequence[Packed]) -> Packed:
    """Several packed batches with rows of one length as one, segments numbered on.

    One pass over a stack costs less than a pass each.
    """
    items = torch.cat([pack.items for pack in packs])
    position = torch.cat([pack.position for pack in packs])
    segment, last, num_rows, num_segments = [], [], 0, 0
    for pack in packs:
        segment.append(torch.where(pack.segment < 0, pack.segment, pack.segment + num_segments))
        last.append(pack.last + num_rows * pack.items.shape[1])
        num_rows += pack.items.shape[0]
        num_segments += pack.last.shape[0]
    return Packed(items, torch.cat(segment), position, torch.cat(last))


def in_rows(packed: Packed, which: Int64[Tensor, " N"]) -> Packed:
    """Some segments of a packed batch, numbered anew, each at the start of a row of its own."""
    last = packed.last[which]
    newest = packed.position.flatten()[last]
    place = torch.arange(packed.items.shape[1], device=last.device)
    is_there = place <= newest[:, None]
    at = torch.where(is_there, (last - newest)[:, None] + place, 0)
    number = torch.arange(len(which), device=last.device)
    return Packed(
        torch.where(is_there, packed.items.flatten()[at], PAD_ID),
        torch.where(is_there, number[:, None], -1),
        torch.where(is_there, place, 0),
        number * len(place) + newest,
    )
