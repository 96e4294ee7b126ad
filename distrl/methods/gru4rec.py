"""GRU4Rec with a full-softmax cross entropy: a recurrent encoder for what attaches to any."""

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from distrl.contract import Batch, Catalog, Losses, Method, Packed, Phase, Term
from distrl.methods.encoding import NextItemConfig, Probability, next_item, target_states
from distrl.nn.gru_encoder import GRUEncoder

ENCODER = Phase("encoder", trains=("encoder",))


class GRU4RecConfig(NextItemConfig):
    """Sizes of GRU4Rec; the defaults are RecBole's."""

    name: Literal["gru4rec"] = "gru4rec"
    inner_size: PositiveInt = 128
    """Width of the recurrent layers."""
    num_layers: PositiveInt = 1
    dropout: Probability = 0.3
    """On item vectors."""

    def build(self, catalog: Catalog) -> "GRU4Rec":
        """The untrained method for one catalog."""
        return GRU4Rec(self, catalog)


class GRU4Rec(Method):
    """The next-item loss on states of a recurrent network.

    Source: GRU4Rec (arXiv:1511.06939) with the full softmax of RecBole, in whose code base SRA-CL
        attaches to it; the original ranks against the other targets of the batch.
    """

    def __init__(self, config: GRU4RecConfig, catalog: Catalog) -> None:
        super().__init__()
        self.config = config
        self.encoder = GRUEncoder(
            num_items=catalog.num_items,
            hidden_size=config.hidden_size,
            inner_size=config.inner_size,
            num_layers=config.num_layers,
            dropout=config.dropout,
        )

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """One part, `encoder`."""
        return {"encoder": self.encoder}

    def phases(self, epoch: int) -> Sequence[Phase]:
        """One step a batch."""
        return (ENCODER,)

    def forward(self, batch: Batch, phase: Phase) -> Losses:
        """The next-item loss at every target."""
        states, _ = target_states(self.encoder, batch)
        return Losses(
            {"next_item": Term(1.0, next_item(self.encoder, states, batch, self.config), "target")}
        )

    def user_states(self, histories: Packed) -> Float[Tensor, "S D"]:
        """The state of each history's newest item."""
        return self.encoder.last_states(histories)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """The tied item table."""
        return self.encoder.item_vectors
