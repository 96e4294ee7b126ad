"""SASRec with a full-softmax cross entropy: the control that contrastive methods have to beat."""

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from distrl.contract import Batch, Catalog, Losses, Method, Packed, Phase, Term
from distrl.methods.encoding import EncoderConfig, next_item, target_states

ENCODER = Phase("encoder", trains=("encoder",))


class SASRecConfig(EncoderConfig):
    """CE-SASRec: MCLRec with every contrastive weight at zero."""

    name: Literal["sasrec"] = "sasrec"
    updates_per_batch: Literal[1, 2] = 1
    """2 takes as many encoder steps as MCLRec's three-step batch does: the fair control for it."""

    def build(self, catalog: Catalog) -> "SASRec":
        """The untrained method for one catalog."""
        return SASRec(self, catalog)


class SASRec(Method):
    """The next-item loss and nothing else.

    Source: SASRec (ICDM 2018), with the loss, the sizes and the post-norm blocks of the MCLRec
        authors' code; the original takes one sampled negative with a binary cross entropy.
    """

    def __init__(self, config: SASRecConfig, catalog: Catalog) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.build_encoder(catalog)

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """One part, `encoder`."""
        return {"encoder": self.encoder}

    def phases(self, epoch: int) -> Sequence[Phase]:
        """The same step once or twice."""
        return (ENCODER,) * self.config.updates_per_batch

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
