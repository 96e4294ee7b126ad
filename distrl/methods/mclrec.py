"""MCLRec: meta-optimized contrastive learning (SIGIR 2023, doi:10.1145/3539618.3591727)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from distrl.contract import Batch, Catalog, Losses, Method, Packed, Phase, Term
from distrl.methods.contrasting import (
    ContrastConfig,
    Contrasted,
    contrasted,
    data_contrast,
    takes_part,
)
from distrl.methods.encoding import next_item, target_states
from distrl.methods.second_order import called_with, detached_weights, stepped
from distrl.nn.augmenters import MLPAugmenter
from distrl.nn.encoder import stack
from distrl.ops.losses import next_item_loss, pair_contrast

ENCODER = Phase("encoder", trains=("encoder",))
AUGMENTERS = Phase("augmenters", trains=("augmenters",))
ENCODER_AGAIN = Phase("encoder_again", trains=("encoder",))
JOINT = Phase("joint", trains=("joint",))


class MCLRecConfig(ContrastConfig):
    """Knobs of MCLRec.

    Defaults are what the authors' code does, which made the published figures; each docstring names
    what the paper says instead.
    """

    name: Literal["mclrec"] = "mclrec"
    steps_per_batch: Literal["joint", 2, 3] = 3
    """3: encoder, augmenters, encoder again (code). 2: encoder, augmenters (paper, Algorithm 1).
    joint: one step over everything (the paper's MCLRec-J)."""
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
    meta: Literal["first_order", "second_order"] = "first_order"
    """How the augmenters are stepped. first_order: against the encoder as it is (paper and code).
    second_order: against the encoder after one more step of its own on Eq. 14, with the augmenters'
    gradient through that step, which is what the paper's title promises; neither has it."""
    meta_lr: PositiveFloat = 1e-3
    """Learning rate of that step, which is plain gradient descent."""
    meta_next_item_weight: NonNegativeFloat = 0.0
    """Weight of the next-item loss after that step in the augmenters' loss; Eq. 15 has none."""

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
        views = batch.views if batch.views and takes_part(self.config, batch) else ()
        states, last = target_states(self.encoder, batch, views)
        terms = {
            "next_item": Term(1.0, next_item(self.encoder, states, batch, self.config), "target")
        }
        if last:
            terms |= self._contrasts(batch, *last)
        return Losses(terms)

    def _contrasts(self, batch: Batch, h1: Tensor, h2: Tensor) -> dict[str, Term]:
        """What Eq. 14 adds to the next-item loss."""
        weight = self.config.model_weight
        learned = self._learned(h1, h2) if weight > 0 else ()
        pairs = contrasted(self.config, batch, (h1, h2, *learned), self.gather)
        terms = data_contrast(self.config, pairs)
        return terms | self._model_terms(pairs, weight, self.config.margin_scale * weight)

    def _learned(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
        """Each view through its own augmenter, or both through the one that there is."""
        return self.augmenters[0](h1), self.augmenters[-1](h2)

    def _augmenter_losses(self, batch: Batch) -> Losses:
        """Eq. 15. The encoder rests: its states carry no gradient, and no clean pass is needed."""
        if batch.views is None or not takes_part(self.config, batch):
            return self._nothing()
        if self.config.meta == "second_order":
            return self._losses_after_step(batch)
        with torch.no_grad():
            h1, h2 = self.encoder.last_states(stack(batch.views)).chunk(2)
        return self._eq_15(batch, h1, h2)

    def _eq_15(self, batch: Batch, h1: Tensor, h2: Tensor) -> Losses:
        """The augmenters' loss for states of the two data views."""
        scale = self.config.margin_scale
        tied = self.config.augmenter_margin == "tied"
        pairs = contrasted(self.config, batch, (h1, h2, *self._learned(h1, h2)), self.gather)
        terms = self._model_terms(pairs, 1.0, scale * self.config.model_weight if tied else scale)
        return Losses(terms) if terms else self._nothing()

    def _losses_after_step(self, batch: Batch) -> Losses:
        """Eq. 15 on the encoder after a step on Eq. 14 that the augmenters are answerable for."""
        views, config = batch.views, self.config
        assert views is not None, "only called with views"
        before = detached_weights(self.encoder)
        states, (h1, h2) = target_states(called_with(self.encoder, before), batch, views)
        next_item_before = self._next_item(before, states, batch)
        terms = self._contrasts(batch, h1, h2)
        data = [t.weight * t.value for name, t in terms.items() if name == "data_contrast"]
        learned = [t.weight * t.value for name, t in terms.items() if name != "data_contrast"]
        after = stepped(
            before,
            fixed=torch.stack([next_item_before, *data]).sum(),
            learned=torch.stack(learned).sum() if learned else None,
            lr=config.meta_lr,
        )
        states, (h1, h2) = target_states(called_with(self.encoder, after), batch, views)
        losses = self._eq_15(batch, h1, h2)
        if config.meta_next_item_weight == 0:
            return losses
        value = self._next_item(after, states, batch)
        return Losses({**losses.terms, "meta": Term(config.meta_next_item_weight, value, "target")})

    def _next_item(self, weights: Mapping[str, Tensor], states: Tensor, batch: Batch) -> Tensor:
        """The next-item loss under weights that are not the encoder's own."""
        table = weights["item_table.weight"][: self.encoder.num_items + 1]
        return next_item_loss(states, table, batch.targets, products=self.config.products)

    def _model_terms(
        self, pairs: Contrasted, weight: float, margin_weight: float
    ) -> dict[str, Term]:
        """Eq. 9's three contrasts with learned views, and the regularizer (Eqs. 11-13)."""
        if weight == 0 or len(pairs.views[0]) < 2:
            return {}
        h1, h2, z1, z2 = pairs.views
        contrast = partial(
            pair_contrast,
            temperature=self.config.temperature,
            anchor=self.config.margin_anchor,
            alike=pairs.alike,
        )
        learned, first, second = contrast(z1, z2), contrast(h1, z2), contrast(h2, z1)
        three = (learned, first, second)
        terms = {
            "model_contrast": Term(weight, torch.stack([p.info_nce for p in three]).sum(), "pair")
        }
        if margin_weight > 0:
            scoped = three if self.config.margin_scope == "all_pairs" else (learned,)
            terms["margin"] = Term(
                margin_weight, torch.stack([p.margin for p in scoped]).sum(), "pair"
            )
        return terms

    def _nothing(self) -> Losses:
        """A loss of zero for a worker without pairs."""
        return Losses({"model_contrast": Term(1.0, self._zero_through_augmenters(), "pair")})

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
