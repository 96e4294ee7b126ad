"""The GRU4Rec encoder over packed sequences. Dimensions: R rows, L slots, S segments, D hidden."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distrl.contract import Packed
from distrl.nn.dropout import Dropout
from distrl.nn.encoder import INIT_STD


class GRUEncoder(nn.Module):
    """A recurrent network in the transformer's place; one state a slot, from its own past alone.

    Source: GRU4Rec (arXiv:1511.06939) as RecBole builds it, which SRA-CL's code base is: item
        vectors, dropout, GRU layers of `inner_size` without bias, and one linear map back to the
        width of the item vectors. Weights of the GRU are Xavier-uniform, item vectors N(0, 0.02)
        like the other encoders' here, where RecBole has Xavier-normal. A hidden item (PAD) is a
        step with PAD's vector, for a GRU cannot pass over it.
    """

    def __init__(
        self, *, num_items: int, hidden_size: int, inner_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.item_table = nn.Embedding(num_items + 2, hidden_size)
        self.dropout = Dropout(dropout)
        self.recurrent = nn.GRU(hidden_size, inner_size, num_layers, batch_first=True, bias=False)
        self.output = nn.Linear(inner_size, hidden_size)
        nn.init.normal_(self.item_table.weight, std=INIT_STD)
        for weight in self.recurrent.parameters():
            nn.init.xavier_uniform_(weight)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """Rows of PAD and the items 0..V, without the mask token's."""
        return self.item_table.weight[: self.num_items + 1]

    def forward(self, packed: Packed, at: Int64[Tensor, " A"] | None = None) -> Tensor:
        """One state a slot.

        Args:
            packed: The sequences.
            at: Flat indices of slots; only their states are returned then, as rows (A D). None
                returns all states (R L D), zero in padding.
        """
        slots = torch.nonzero(packed.segment.flatten() >= 0).squeeze(1)
        segment, position = packed.segment.flatten()[slots], packed.position.flatten()[slots]
        if not len(slots):
            empty = self.item_table.weight.new_zeros(
                (*packed.items.shape, self.output.out_features)
            )
            return empty if at is None else empty.flatten(0, 1)[at]
        embedded = self.dropout(self.item_table(packed.items.flatten()[slots]))
        size = (int(segment.max()) + 1, int(position.max()) + 1, embedded.shape[1])
        padded_SLD = embedded.new_zeros(size).index_put((segment, position), embedded)
        states = self.output(self.recurrent(padded_SLD)[0][segment, position])
        whole = states.new_zeros((packed.items.numel(), states.shape[1])).index_put(
            (slots,), states
        )
        return whole.view(*packed.items.shape, -1) if at is None else whole[at]

    def last_states(self, packed: Packed) -> Float[Tensor, "S D"]:
        """The state of each segment's newest slot."""
        return self(packed, packed.last)
