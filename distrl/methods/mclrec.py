"""MCLRec: meta-optimized contrastive learning (SIGIR 2023, doi:10.1145/3539618.3591727)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from distrl.contract import Batch, Catalog, Losses, Method, Packed, Phase, Term
from distrl.methods.encoding import EncoderConfig, next_item, target_states
from distrl.nn.augmenters import MLPAugmenter
from distrl.nn.encoder import stack
from distrl.ops.losses import info_nce, pair_contrast

ENCODER = Phase("encoder", trains=("encoder",))
AUGMENTERS = Phase("augmenters", trains=("augmenters",))
ENCODER_AGAIN = Phase("encoder_again", trains=("encoder",))
JOINT = Phase("joint", trains=("joint",))


class MCLRecConfig(EncoderConfig):
    """Knobs of MCLRec.

    Defaults are what the authors' code does, which made the published figures; each docstring names
    what the paper says instead.
    """

    name: Literal["mclrec"] = "mclrec"
    steps_per_batch: Literal["joint", 2, 3] = 3
    """3: encoder, augmenters, encoder again (code). 2: encoder, augmenters (paper, Algorithm 1).
    joint: one step over everything (the paper's MCLRec-J)."""
    temperature: PositiveFloat = 1.0
    similarity: Literal["dot", "cosine"] = "dot"
    """Of the contrast between the two data views; contrasts with learned views take the dot."""
    data_weight: NonNegativeFloat = 0.0
    """Weight of the contrast between the two data views: lambda in Eq. 14."""
    model_weight: NonNegativeFloat = 0.05
    """Weight of the contrasts that involve the learned views: beta in Eq. 14."""
    margin_scale: NonNegativeFloat = 0.1
    """Regularizer relative to the contrasts it joins; 0 leaves it out."""
    margin_scope: Literal["all_pairs", "learned_pair"] = "all_pairs"
    """all_pairs: three pairs (code). learned_pair: only the two learned views (paper, Eq. 11)."""
    margin_anchor: Literal["per_anchor", "global"] = "per_anchor"
    """Bounds of the regularizer: per anchor (code) or over the whole batch (paper, Eq. 12)."""
    augmenter_margin: Literal["fixed", "tied"] = "fixed"
    """Weight of the regularizer in the augmenters' step: margin_scale (code), or margin_scale *
    model_weight (paper, Eq. 15 with gamma = 0.1 beta)."""
    normalize_learned: bool = True
    """Divide learned views by their L2 norm (code; not in the paper)."""
    augmenter_sizes: tuple[PositiveInt, ...] = (32, 16)
    """Widths inside each augmenter (code; the paper says 3 layers)."""
    share_augmenter: bool = False
    """One augmenter for both views: ablation (E) of the paper's Table 4."""

    def build(self, catalog: Catalog) -> "MCLRec":
        """The untrained method for one catalog."""
        return MCLRec(self, catalog)


class MCLRec(Method):
    """SASRec plus two learned augmenters, trained in alternation (Algorithm 1).

    First-order alternation on the same batch, as in the authors' code: no gradient flows through
    another phase's update. Where the learned views have no weight the augmenters rest; with both
    weights at zero no view is drawn and what remains is CE-SASRec with one or two updates a batch.
    """

    def __init__(self, config: MCLRecConfig, catalog: Catalog) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.build_encoder(catalog)
        self.augmenters = nn.ModuleList(
            MLPAugmenter(
                hidden_size=config.hidden_size,
                bottleneck=config.augmenter_sizes,
                normalize=config.normalize_learned,
            )
            for _ in range(1 if config.share_augmenter else 2)
        )
        self.num_views = 2 if config.data_weight > 0 or config.model_weight > 0 else 0

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """`encoder` and `augmenters`, or `joint` where they always move together."""
        if self.config.steps_per_batch == "joint":
            return {"joint": nn.ModuleList([self.encoder, self.augmenters])}
        return {"encoder": self.encoder, "augmenters": self.augmenters}

    def phases(self, epoch: int) -> Sequence[Phase]:
        """Encoder, then augmenters against the encoder just updated, then the encoder once more."""
        if self.config.steps_per_batch == "joint":
            return (JOINT,)
        encoder_steps = (ENCODER, ENCODER_AGAIN)[: self.config.steps_per_batch - 1]
        if self.config.model_weight == 0:
            return encoder_steps
        return (ENCODER, AUGMENTERS, *encoder_steps[1:])

    def forward(self, batch: Batch, phase: Phase) -> Losses:
        """Eq. 14 where the encoder moves, Eq. 15 where the augmenters do."""
        if phase == AUGMENTERS:
            return self._augmenter_losses(batch)
        contrasted = batch.views if batch.views is not None and batch.num_pairs else ()
        states, last = target_states(self.encoder, batch, contrasted)
        terms = {
            "next_item": Term(1.0, next_item(self.encoder, states, batch, self.config), "target")
        }
        if last:
            h1, h2 = last
            weight = self.config.model_weight
            terms |= self._data_term(h1, h2)
            terms |= self._model_terms(h1, h2, weight, self.config.margin_scale * weight)
        return Losses(terms)

    def _augmenter_losses(self, batch: Batch) -> Losses:
        """Eq. 15. The encoder rests: its states carry no gradient, and no clean pass is needed."""
        if batch.views is None or not batch.num_pairs:
            return Losses({"model_contrast": Term(1.0, self._zero_through_augmenters(), "pair")})
        with torch.no_grad():
            h1, h2 = self.encoder.last_states(stack(batch.views)).chunk(2)
        scale = self.config.margin_scale
        tied = self.config.augmenter_margin == "tied"
        return Losses(
            self._model_terms(h1, h2, 1.0, scale * self.config.model_weight if tied else scale)
        )

    def _data_term(self, h1: Tensor, h2: Tensor) -> dict[str, Term]:
        """The contrast of the two data views (Eq. 7)."""
        if self.config.data_weight == 0:
            return {}
        if self.config.similarity == "cosine":
            h1, h2 = F.normalize(h1, dim=1), F.normalize(h2, dim=1)
        value = info_nce(h1, h2, temperature=self.config.temperature)
        return {"data_contrast": Term(self.config.data_weight, value, "pair")}

    def _model_terms(
        self, h1: Tensor, h2: Tensor, weight: float, margin_weight: float
    ) -> dict[str, Term]:
        """Eq. 9's three contrasts with learned views, and the regularizer (Eqs. 11-13)."""
        if weight == 0:
            return {}
        z1, z2 = self._learned(h1, h2)
        contrast = partial(
            pair_contrast,
            temperature=self.config.temperature,
            anchor=self.config.margin_anchor,
        )
        learned, first, second = contrast(z1, z2), contrast(h1, z2), contrast(h2, z1)
        pairs = (learned, first, second)
        terms = {
            "model_contrast": Term(weight, torch.stack([p.info_nce for p in pairs]).sum(), "pair")
        }
        if margin_weight > 0:
            scoped = pairs if self.config.margin_scope == "all_pairs" else (learned,)
            terms["margin"] = Term(
                margin_weight, torch.stack([p.margin for p in scoped]).sum(), "pair"
            )
        return terms

    def _learned(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
        """Each view through its own augmenter, or both through the one that there is."""
        return self.augmenters[0](h1), self.augmenters[-1](h2)

    def _zero_through_augmenters(self) -> Tensor:
        """Zero with a graph, so that a worker without pairs still takes part in the backward."""
        hidden_size = self.config.hidden_size
        ones = self.encoder.item_table.weight.new_ones((1, hidden_size))
        return torch.stack([augmenter(ones).sum() for augmenter in self.augmenters]).sum() * 0.0

    def view_states(self, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """`data`: the states of the two augmented views; `learned`: what the augmenters make."""
        if batch.views is None or not batch.num_pairs:
            return {}
        h1, h2 = self.encoder.last_states(stack(batch.views)).chunk(2)
        return {"data": (h1, h2), "learned": self._learned(h1, h2)}

    def user_states(self, histories: Packed) -> Float[Tensor, "S D"]:
        """The state of each history's newest item; the augmenters play no part."""
        return self.encoder.last_states(histories)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """The tied item table."""
        return self.encoder.item_vectors
