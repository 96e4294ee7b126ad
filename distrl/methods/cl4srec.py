"""CL4SRec: contrastive learning for sequential recommendation (ICDE 2022, arXiv:2010.14395)."""

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from distrl.contract import Batch, Catalog, Losses, Method, Packed, Phase, Term
from distrl.methods.contrasting import ContrastConfig, contrasted, data_contrast, takes_part
from distrl.methods.encoding import next_item, target_states
from distrl.nn.encoder import stack

ENCODER = Phase("encoder", trains=("encoder",))


class CL4SRecConfig(ContrastConfig):
    """Knobs of CL4SRec; `data_weight` is lambda in the paper's Eq. 16."""

    name: Literal["cl4srec"] = "cl4srec"
    data_weight: NonNegativeFloat = 0.1
    """Weight of the contrast between the two augmented views: lambda in the paper's Eq. 16."""
    updates_per_batch: Literal[1, 2] = 1

    def build(self, catalog: Catalog) -> "CL4SRec":
        """The untrained method for one catalog."""
        return CL4SRec(self, catalog)


class CL4SRec(Method):
    """SASRec plus InfoNCE between two augmented views of each sequence, in one step.

    Source: CL4SRec Eqs. 3 and 16, with the full softmax and InfoNCE's mean over 2B anchors of the
        MCLRec and DuoRec code base; the paper's next-item loss samples one negative.
    """

    def __init__(self, config: CL4SRecConfig, catalog: Catalog) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.build_encoder(catalog)
        self.num_views = 2 if config.data_weight > 0 else 0

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """One part, `encoder`."""
        return {"encoder": self.encoder}

    def phases(self, epoch: int) -> Sequence[Phase]:
        """The same step once or twice."""
        return (ENCODER,) * self.config.updates_per_batch

    def forward(self, batch: Batch, phase: Phase) -> Losses:
        """Next item, and the contrast of the two views where the batch has negatives."""
        extra = batch.views if batch.views and takes_part(self.config, batch) else ()
        states, last = target_states(self.encoder, batch, extra)
        terms = {
            "next_item": Term(1.0, next_item(self.encoder, states, batch, self.config), "target")
        }
        if last:
            pairs = contrasted(self.config, batch, tuple(last), self.gather)
            terms |= data_contrast(self.config, pairs)
        return Losses(terms)

    def view_states(self, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """`data`: the two augmented views."""
        if batch.views is None or not batch.num_pairs:
            return {}
        h1, h2 = self.encoder.last_states(stack(batch.views)).chunk(2)
        return {"data": (h1, h2)}

    def user_states(self, histories: Packed) -> Float[Tensor, "S D"]:
        """The state of each history's newest item."""
        return self.encoder.last_states(histories)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """The tied item table."""
        return self.encoder.item_vectors
