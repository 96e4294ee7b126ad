"""SRA-CL: positives retrieved by what texts say (arXiv:2503.04162), on top of any other method.

Dimensions: P contrasted prefixes, K neighbors of each, U different neighbors, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from distrl.contract import Batch, Catalog, Losses, Method, Neighbors, Packed, Phase, Term
from distrl.methods.cl4srec import CL4SRecConfig
from distrl.methods.contrasting import NegativesConfig, contrasted, takes_part
from distrl.methods.encoding import MethodConfig, Probability
from distrl.methods.gru4rec import GRU4RecConfig
from distrl.methods.mclrec import MCLRecConfig
from distrl.methods.sasrec import SASRecConfig
from distrl.nn.encoder import stack
from distrl.nn.synthesizer import Synthesizer
from distrl.ops.losses import info_nce, one_way_info_nce

SYNTHESIZER = "synthesizer"
ENCODERS = ("encoder", "joint")
"""Parts of a base in one of which its encoder is."""


class SRACLConfig(MethodConfig, NegativesConfig):
    """Knobs of SRA-CL; the defaults are the authors' command line."""

    name: Literal["sracl"] = "sracl"
    base: Annotated[
        SASRecConfig | CL4SRecConfig | MCLRecConfig | GRU4RecConfig, Field(discriminator="name")
    ] = SASRecConfig()
    """What the semantic losses are added to; it keeps its own loss, phases and views."""
    inter_weight: NonNegativeFloat = 0.1
    """Weight alpha of the contrast with a sample made of like users' prefixes."""
    intra_weight: NonNegativeFloat = 0.1
    """Weight beta of the contrast between two views with items replaced by like ones."""
    synthesizer: Literal["gat", "gatv2", "mean", "random"] = "gat"
    """How the neighbors of a prefix become one sample: weighed by a learned score (gat), by one
    that depends on the prefix too (gatv2, ours), all alike, or one of them drawn anew each epoch
    (the ablation without learning), the only one that is read and encoded."""
    synthesizer_dropout: Probability = 0.5
    """On the weights of the neighbors, which the paper leaves out and the code has."""
    inter_loss: Literal["symmetric", "one_way"] = "symmetric"
    """symmetric: prefixes and samples are each other's anchors and negatives (code). one_way:
    prefixes against samples alone (paper)."""
    text_size: PositiveInt = 384
    """Width of the text vectors; that of the embedder. Only a learned score asks for it."""

    @property
    def epochs_before_ranking(self) -> int:
        """As the base."""
        return self.base.epochs_before_ranking

    @property
    def takes_neighbors(self) -> bool:
        """Always: a run with both weights at zero is the base on the same stream."""
        return True

    @property
    def text_width(self) -> int:
        """Of the text vectors."""
        return self.text_size

    def build(self, catalog: Catalog) -> "SRACL":
        """The untrained method for one catalog."""
        return SRACL(self, catalog)


class SRACL(Method):
    """A base method with two more losses, which only training pays for.

    Wherever the base moves its encoder, L = L_base + alpha L_CS + beta L_IS.

    Source: SRA-CL's paper and code. Deviations: the prefixes that are contrasted are those that the
        stream contrasts (`data.contrasted_prefixes`), not every prefix; anchors, neighbors and
        views are one pass of the encoder beside the base's own, in which a neighbor is encoded once
        however many prefixes have it, and shares the pass, and with it the dropout, of a longer one
        of the same user; a prefix without neighbors has no part in L_CS; PAD's row is a class of
        the base's softmax (`next_item_loss`), and none of the authors'; checkpoints and the end of
        training go by NDCG@10 on validation (`SELECT_BY` in distrl/train/monitor.py), where the
        code has MRR@10, after every epoch, with a patience of 10.
    """

    def __init__(self, config: SRACLConfig, catalog: Catalog) -> None:
        super().__init__()
        self.config = config
        self.base = config.base.build(catalog)
        self.num_views = self.base.num_views
        if config.inter_weight > 0:
            self.wants_neighbors = "one" if config.synthesizer == "random" else "all"
        self.wants_semantic_views = config.intra_weight > 0
        self.synthesizer = self._build_synthesizer() if self._learns else None

    @property
    def _learns(self) -> bool:
        return self.config.inter_weight > 0 and self.config.synthesizer in ("gat", "gatv2")

    def _build_synthesizer(self) -> Synthesizer:
        score = "gatv2" if self.config.synthesizer == "gatv2" else "gat"
        return Synthesizer(
            text_size=self.config.text_size,
            hidden_size=self.config.base.hidden_size,
            score=score,
            dropout=self.config.synthesizer_dropout,
        )

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The base's, and `synthesizer` where one is learned."""
        learned = {} if self.synthesizer is None else {SYNTHESIZER: self.synthesizer}
        return {**self.base.parts, **learned}

    def phases(self, epoch: int) -> Sequence[Phase]:
        """The base's; the synthesizer moves with the encoder."""
        return tuple(self._extended(phase) for phase in self.base.phases(epoch))

    def _extended(self, phase: Phase) -> Phase:
        if self.synthesizer is None or not _moves_encoder(phase):
            return phase
        return replace(phase, trains=(*phase.trains, SYNTHESIZER))

    def forward(self, batch: Batch, phase: Phase) -> Losses:
        """The base's losses, and the semantic ones where the encoder moves."""
        self.base.gather = self.gather
        own = tuple(part for part in phase.trains if part != SYNTHESIZER)
        losses = self.base(batch, replace(phase, trains=own))
        if not _moves_encoder(phase) or not takes_part(self.config, batch):
            return losses
        return Losses({**losses.terms, **self._semantic_terms(batch)})

    def _semantic_terms(self, batch: Batch) -> dict[str, Term]:
        """Alpha L_CS + beta L_IS, out of one pass of the encoder."""
        states = self._encoded(batch)
        terms: dict[str, Term] = {}
        if batch.neighbors is not None:
            anchors, neighbors = states["anchors"], states["neighbors"]
            terms |= self._inter(batch, batch.neighbors, anchors, neighbors)
        if batch.semantic_views is not None:
            terms |= self._intra(batch, states["first"], states["second"])
        return terms

    def _encoded(self, batch: Batch) -> dict[str, Float[Tensor, "S D"]]:
        """States of all that the semantic losses compare."""
        packs: dict[str, Packed] = {}
        if batch.neighbors is not None:
            packs["anchors"] = batch.neighbors.anchors
            packs["neighbors"] = batch.neighbors.sequences
        if batch.semantic_views is not None:
            packs["first"], packs["second"] = batch.semantic_views
        if not packs:
            return {}
        counts = [len(pack.last) for pack in packs.values()]
        states = self.base.user_states(stack(list(packs.values())))
        return dict(zip(packs, states.split(counts), strict=True))

    def _inter(
        self, batch: Batch, found: Neighbors, anchors: Tensor, neighbors: Tensor
    ) -> dict[str, Term]:
        """L_CS: each prefix against the sample made of its neighbors."""
        has_any = (found.of_pair >= 0).any(dim=1)
        made = self._synthesized(found, neighbors)
        pairs = contrasted(self.config, batch, (anchors, made), self.gather)
        if self.config.negatives == "all_workers":
            has_any = self.gather(has_any.to(torch.int64)) > 0
        first, second = (view[has_any] for view in pairs.views)
        if len(first) < 2:
            return {}
        alike = None if pairs.alike is None else pairs.alike[has_any][:, has_any]
        loss = info_nce if self.config.inter_loss == "symmetric" else one_way_info_nce
        value = loss(first, second, temperature=self.config.temperature, alike=alike)
        return {"inter_user": Term(self.config.inter_weight, value, "pair")}

    def _intra(self, batch: Batch, first: Tensor, second: Tensor) -> dict[str, Term]:
        """L_IS: the two semantic views of each prefix."""
        pairs = contrasted(self.config, batch, (first, second), self.gather)
        if len(pairs.views[0]) < 2:
            return {}
        first, second = pairs.views
        value = info_nce(first, second, temperature=self.config.temperature, alike=pairs.alike)
        return {"intra_user": Term(self.config.intra_weight, value, "pair")}

    def _synthesized(self, found: Neighbors, neighbors: Float[Tensor, "U D"]) -> Tensor:
        """The positive sample (P D) of each prefix; zero where it has no neighbors."""
        if not len(neighbors):
            return neighbors.new_zeros((len(found.of_pair), neighbors.shape[1]))
        weights_PK = self._weights(found).to(neighbors.dtype)
        return torch.einsum("pk,pkd->pd", weights_PK, neighbors[found.of_pair.clamp(min=0)])

    def _weights(self, found: Neighbors) -> Float[Tensor, "P K"]:
        if self.synthesizer is not None:
            return self.synthesizer(found.text, found.neighbor_text, found.of_pair)
        is_there_PK = (found.of_pair >= 0).float()
        return is_there_PK / is_there_PK.sum(dim=1, keepdim=True).clamp(min=1)

    def view_states(self, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The base's, `semantic`: both views, `synthesized`: prefixes and what is made for them."""
        shown = dict(self.base.view_states(batch))
        if not batch.num_pairs:
            return shown
        states = self._encoded(batch)
        if batch.semantic_views is not None:
            shown["semantic"] = states["first"], states["second"]
        found = batch.neighbors
        if found is not None and (has_any := (found.of_pair >= 0).any(dim=1)).sum() > 1:
            made = self._synthesized(found, states["neighbors"])
            shown["synthesized"] = states["anchors"][has_any], made[has_any]
        return shown

    def user_states(self, histories: Packed) -> Float[Tensor, "S D"]:
        """The base's: texts play no part."""
        return self.base.user_states(histories)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """The base's."""
        return self.base.item_vectors


def _moves_encoder(phase: Phase) -> bool:
    return any(part in ENCODERS for part in phase.trains)
