"""LACLRec: a learnable sequence augmenter and triplet contrast (arXiv:2503.20232)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from distrl.contract import (
    Batch,
    Catalog,
    CorruptionRates,
    Damaged,
    Losses,
    Mark,
    Method,
    Packed,
    Phase,
    Term,
)
from distrl.methods.contrasting import ContrastConfig, contrasted, data_contrast, takes_part
from distrl.methods.encoding import Probability, next_item
from distrl.methods.mending import Mended, marked, mended, mending_figures, unchanged_share
from distrl.nn.attention import visible_keys
from distrl.nn.corrector import Corrector
from distrl.nn.encoder import EncoderLayer, SequenceEncoder, in_rows, stack
from distrl.ops.losses import next_item_loss, ranking_triplet

HELD_OUT_LOSS = "augmenter/held_out_loss"
"""Of what is judged after each epoch, the figure that ends the first stage."""


class LACLRecConfig(ContrastConfig):
    """Knobs of LACLRec.

    Neither the paper's body nor its successor's is public; defaults are what the code of TCLARec
    does (doi:10.1145/3726302.3730101), unless a docstring says otherwise.
    """

    name: Literal["laclrec"] = "laclrec"
    data_weight: NonNegativeFloat = 0.1
    """Weight alpha of the contrast between the random and the learned view."""
    triplet_weight: NonNegativeFloat = 0.001
    """Weight beta of the ranking triplet loss."""
    triplet: Literal["sum", "mean"] = "sum"
    """Over the batch's prefixes. The code sums: beta times the prefixes weighs the mean. The mean
    leaves out a batch of a single prefix, as the contrast does."""
    learned_view: bool = True
    """Otherwise a second random view takes its place: the ablation without the augmenter."""
    recommender_layers: PositiveInt = 1
    """Causal blocks between the encoder and the scores, which the augmenter does not share."""
    share_encoder: bool = True
    """Whether the augmenter reads states and items of the recommender's encoder (code), which is
    trained when the second stage begins and goes on moving under the augmenter, or has an encoder
    and an item table of its own, which rest in the second stage."""
    stages: Literal["two", "joint"] = "two"
    """two: the augmenter alone for `pretrain_epochs`, then the recommender alone. joint: from then
    on both in one step, which LACLRec's ancestor STEAM does from the start."""
    pretrain_epochs: NonNegativeInt = 50
    """Epochs of the first stage, at most."""
    pretrain_patience: PositiveInt | None = None
    """Epochs without a lower loss on held-out damaged sequences before the first stage ends; None
    goes through all of its epochs."""
    augmenter_weight: NonNegativeFloat = 1.0
    """Weight of the augmenter's loss beside the recommender's where stages are joint."""
    keep: Probability = 0.4
    """Share of draws that keep an item when a sequence is damaged."""
    delete: Probability = 0.45
    """Share that delete it, which the augmenter learns to insert."""
    insert: Probability = 0.15
    """Share that put a random item in front of it, which the augmenter learns to delete."""
    max_inserted: PositiveInt = 5
    """Items deleted in a row, and inserted into one gap, at most."""
    operations: Literal["sample", "argmax", "logit_times_uniform"] = "sample"
    """How the learned view chooses at each slot: by the three probabilities (a commented-out part
    of the code), the likeliest (STEAM), or the code's largest logit times a uniform draw. Draws are
    seeded by run, step and worker, as those of dropout: the same after a restart, others at another
    number of workers."""
    bidirectional: bool = False
    """Whether the augmenter's pass sees newer items too, as the code's README promises and STEAM
    does; the code's own is causal."""
    places_added: Literal["once", "each_step"] = "once"
    """How the generator sees the places of a gap when it fills one: as in training, or with each
    added again at every step, as in the code."""
    scramble: bool = False
    """Whether the learned view loses repeated items and its order, as in the code, which passes it
    through a set of ids."""

    @model_validator(mode="after")
    def _probabilities(self) -> "LACLRecConfig":
        total = self.keep + self.delete + self.insert
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"keep={self.keep}, delete={self.delete} and insert={self.insert} make {total:g}; "
                "they must make 1"
            )
        untrained = self.learned_view and self.stages == "two" and not self.pretrain_epochs
        if untrained and (self.data_weight or self.triplet_weight):
            raise ValueError(
                "pretrain_epochs=0 leaves the augmenter untrained with stages=two; set it to 1 or "
                "more, stages=joint or learned_view=false"
            )
        if self.keep == 0:
            raise ValueError("keep=0 leaves nothing to learn from; it must be positive")
        return self

    @property
    def epochs_before_ranking(self) -> int:
        """Those of the first stage."""
        return self.pretrain_epochs if self.learned_view else 0

    def build(self, catalog: Catalog) -> "LACLRec":
        """The untrained method for one catalog."""
        return LACLRec(self, catalog)

    def build_corrector(self) -> Corrector:
        """The untrained operation head and generator."""
        return Corrector(
            hidden_size=self.hidden_size,
            inner_size=self.inner_size,
            num_heads=self.num_heads,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            max_inserted=self.max_inserted,
        )

    def build_blocks(self) -> nn.ModuleList:
        """The untrained blocks of the recommender."""
        blocks = nn.ModuleList(
            EncoderLayer(
                hidden_size=self.hidden_size,
                inner_size=self.inner_size,
                num_heads=self.num_heads,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
            )
            for _ in range(self.recommender_layers)
        )
        return blocks.apply(_init)


class LACLRec(Method):
    """A recommender whose views are mended by an augmenter that learned to undo random damage.

    Source: the code of TCLARec, as the paper's body is not public. Deviations: the encoder is the
        one all methods here have (norm after the embeddings, GELU, N(0, 0.02)), not the code's;
        scores are of real items and PAD, not of the end and the mask; damaged sequences and learned
        views are cut to the newest `max_len` items, where the code has room for ten more; an empty
        view becomes the mask token, where the code has the end.
    """

    first_stage_ended: Tensor
    """Epoch before which the first stage was ended; -1 as long as it was not."""
    lowest_loss: Tensor
    """On held-out damage, of any epoch of the first stage."""
    epochs_since_lowest: Tensor

    def __init__(self, config: LACLRecConfig, catalog: Catalog) -> None:
        super().__init__()
        self.config, self.max_len = config, catalog.max_len
        self.register_buffer("first_stage_ended", torch.tensor(-1))
        self.register_buffer("lowest_loss", torch.tensor(torch.inf))
        self.register_buffer("epochs_since_lowest", torch.tensor(0))
        self.encoder = config.build_encoder(catalog)
        self.recommender = config.build_blocks()
        mends = config.learned_view
        own = nn.ModuleList([] if config.share_encoder else [config.build_encoder(catalog)])
        self.augmenter = nn.ModuleList([config.build_corrector(), own] if mends else [])
        self.num_views = 1 if mends else 2
        if not config.data_weight and not config.triplet_weight:
            self.num_views = 0
        if mends and (config.pretrain_epochs > 0 or config.stages == "joint"):
            self.corruption = CorruptionRates(
                config.keep, config.delete, config.insert, config.max_inserted
            )

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """`encoder`, `recommender` and, unless views are random alone, `augmenter`."""
        parts = {"encoder": self.encoder, "recommender": self.recommender}
        return parts | ({"augmenter": self.augmenter} if self.config.learned_view else {})

    def phases(self, epoch: int) -> Sequence[Phase]:
        """One step a batch: the augmenter's, the recommender's, or both."""
        if self._pretrains(epoch):
            shared = ("encoder",) if self.config.share_encoder else ()
            return (Phase("augmenter", (*shared, "augmenter")),)
        if self.config.stages == "joint" and self.config.learned_view:
            return (Phase("joint", ("encoder", "recommender", "augmenter")),)
        return (Phase("recommender", ("encoder", "recommender")),)

    def _pretrains(self, epoch: int) -> bool:
        over = 0 <= int(self.first_stage_ended) <= epoch
        return self.config.learned_view and epoch < self.config.pretrain_epochs and not over

    def can_rank(self, epoch: int) -> bool:
        """Not before the recommender has been trained."""
        return not self._pretrains(epoch)

    def heed(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Ends the first stage when the held-out loss has stopped falling."""
        if not self._pretrains(epoch) or self.config.pretrain_patience is None:
            return
        loss = figures[HELD_OUT_LOSS]
        is_lower = loss < float(self.lowest_loss)
        self.lowest_loss.fill_(min(loss, float(self.lowest_loss)))
        self.epochs_since_lowest.fill_(0 if is_lower else int(self.epochs_since_lowest) + 1)
        if int(self.epochs_since_lowest) >= self.config.pretrain_patience:
            self.first_stage_ended.fill_(epoch + 1)

    def forward(self, batch: Batch, phase: Phase) -> Losses:
        """The augmenter's loss, the recommender's, or their weighted sum."""
        if phase.name == "augmenter":
            return Losses(self._augmenter_terms(batch.damaged, 1.0))
        terms = self._recommender_terms(batch)
        if phase.name == "joint":
            terms |= self._augmenter_terms(batch.damaged, self.config.augmenter_weight)
        return Losses(terms)

    def _augmenter_terms(self, damaged: Damaged | None, weight: float) -> dict[str, Term]:
        """L_aug: the operation of each slot, and the items missing in front of anchors."""
        assert damaged is not None, "the stream damages sequences for this method"
        corrector, states = self._corrector, self._mending_states(damaged.sequences)
        labels = damaged.operations.flatten()
        logits = corrector.operation(states.flatten(0, 1)[labels >= 0])
        # Without any slot the mean would be NaN.
        operation = F.cross_entropy(logits, labels[labels >= 0], reduction="sum")
        return {
            "operation": Term(weight, operation / max(len(logits), 1), "token"),
            "insertion": Term(weight, self._insertion(states, damaged), "missing"),
        }

    def _insertion(self, states: Tensor, damaged: Damaged) -> Float[Tensor, ""]:
        """Cross entropy of each missing item given those nearer to the anchor, and of the end."""
        missing = damaged.missing
        places = torch.arange(missing.shape[1], device=missing.device)
        asked = places <= (missing > 0).sum(dim=1, keepdim=True)
        items = self._mending_encoder.item_vectors
        scored = self._corrector(states.flatten(0, 1)[damaged.anchor_at], items[missing[:, :-1]])
        classes = self._corrector.classes(items)
        products = self.config.products
        return next_item_loss(scored[asked], classes, missing[asked], products=products)

    @property
    def _corrector(self) -> Corrector:
        corrector = self.augmenter[0]
        assert isinstance(corrector, Corrector)
        return corrector

    @property
    def _mending_encoder(self) -> SequenceEncoder:
        """What the augmenter reads, its own encoder or the recommender's."""
        own = self.augmenter[1]
        assert isinstance(own, nn.ModuleList)
        encoder = own[0] if len(own) else self.encoder
        assert isinstance(encoder, SequenceEncoder)
        return encoder

    def _mending_states(self, packed: Packed) -> Float[Tensor, "R L D"]:
        """What the augmenter knows of each slot."""
        return self._mending_encoder(packed, causal=not self.config.bidirectional)

    def _recommender_terms(self, batch: Batch) -> dict[str, Term]:
        """L_rec + alpha L_cl + beta L_tri."""
        wanted = self._sees_views(batch)
        views = self._views(batch) if wanted else ()
        cut = self._cut(batch) if wanted else batch.target_at[:0]
        whole = (in_rows(batch.views[1], cut),) if batch.views is not None and len(cut) else ()
        packs = [batch.clean, *whole, *views]
        stacked = stack(packs) if views else batch.clean
        anchor_at = batch.target_at[:0] if batch.pair_at is None else batch.pair_at
        at = torch.cat([batch.target_at, anchor_at, stacked.last[len(batch.clean.last) :]])
        counts = [batch.num_targets, len(anchor_at), len(cut), *(len(view.last) for view in views)]
        states, anchors, uncut, *last = torch.split(self._recommended(stacked, at), counts)
        anchors = anchors.index_copy(0, cut, uncut) if len(cut) else anchors
        terms = {
            "next_item": Term(1.0, next_item(self.encoder, states, batch, self.config), "target")
        }
        if last:
            far, near = last
            pairs = contrasted(self.config, batch, (far, near), self.gather)
            terms |= data_contrast(self.config, pairs)
            terms |= self._triplet(anchors, near, far)
        return terms

    def _sees_views(self, batch: Batch) -> bool:
        """Whether views are encoded: a single prefix has no contrast but a triplet."""
        if batch.views is None:
            return False
        has_triplet = self.config.triplet_weight > 0 and len(batch.views[0].last) > 0
        return has_triplet or takes_part(self.config, batch)

    def _cut(self, batch: Batch) -> Int64[Tensor, " C"]:
        """Prefixes of which an anchor within `clean` would not see all that the views show.

        Those of histories longer than a window, which may begin elsewhere there.
        """
        if batch.pair_at is None or not self.config.triplet_weight or self.num_views != 1:
            return batch.target_at[:0]
        assert batch.views is not None, "only called with views"
        raw = batch.views[1]
        seen = batch.clean.position.flatten()[batch.pair_at]
        return (seen != raw.position.flatten()[raw.last]).nonzero().flatten()

    def _triplet(self, anchors: Tensor, near: Tensor, far: Tensor) -> dict[str, Term]:
        """L_tri; nothing without weight or prefixes."""
        weight = self.config.triplet_weight
        if weight == 0 or len(anchors) == 0:
            return {}
        values = ranking_triplet(anchors, near, far)
        if self.config.triplet == "mean":
            return {"triplet": Term(weight, values.mean(), "pair")}
        return {"triplet": Term(weight, values.sum(), "sum")}

    def _recommended(self, packed: Packed, at: Int64[Tensor, " A"]) -> Float[Tensor, "A D"]:
        """The recommender's states at some slots."""
        states, visible = self.encoder(packed), visible_keys(packed)
        *lower, upper = self.recommender
        for block in lower:
            states = block(states, visible)
        return upper(states, visible, at)

    def _views(self, batch: Batch) -> tuple[Packed, Packed]:
        """The random view of each prefix, and the learned one."""
        assert batch.views is not None, "only called with views"
        far, second = batch.views
        if not self.config.learned_view:
            return far, second
        return far, self._mended(second).sequences

    @torch.no_grad()
    def _mended(self, packed: Packed, *, sampled: bool | None = None) -> Mended:
        """Sequences as the augmenter would have them; it rests, and nothing is dropped out."""
        sampled = self.training if sampled is None else sampled
        with _evaluating(self):
            states = self._mending_states(packed).flatten(0, 1)
            logits = self._corrector.operation(states)
            rule = self.config.operations if sampled else "argmax"
            return mended(
                packed,
                chosen_operations(logits, rule),
                lambda at: self._generated(states[at]),
                max_len=self.max_len,
                empty_id=self.encoder.num_items + 1,
                scramble=self.config.scramble,
            )

    def _generated(self, states: Float[Tensor, "A D"]) -> Int64[Tensor, "A K"]:
        """What is missing in front of some slots."""
        items, places_added = self._mending_encoder.item_vectors, self.config.places_added
        return self._corrector.generate(states, items, places_added=places_added)

    @torch.no_grad()
    def judged(self, batch: Batch) -> Mapping[str, float]:
        """The augmenter on held-out damage: its loss, and what it finds and puts back.

        And of the views: what it does to a prefix, and how many are the prefix itself.
        """
        if not self.config.learned_view or batch.damaged is None:
            return {}
        terms = self._augmenter_terms(batch.damaged, 1.0)
        found = self._mended(batch.damaged.sequences, sampled=False)
        figures = mending_figures(batch.damaged, found)
        figures |= {f"{name}_loss": float(term.value) for name, term in terms.items()}
        figures["held_out_loss"] = sum(float(term.value) for term in terms.values())
        if batch.views is not None:
            random, prefixes = batch.views
            learned = self._mended(prefixes, sampled=True)
            figures |= learned.shares()
            figures["random_unchanged_share"] = unchanged_share(random, prefixes)
            figures["learned_unchanged_share"] = unchanged_share(learned.sequences, prefixes)
        return {f"augmenter/{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def examples(
        self, batch: Batch, count: int
    ) -> Mapping[str, Sequence[Sequence[tuple[int, Mark]]]]:
        """Held-out histories, and the same ones damaged; the likeliest operation at each item."""
        if not self.config.learned_view or batch.damaged is None:
            return {}
        packs = {"damaged histories": batch.damaged.sequences}
        packs |= {} if batch.views is None else {"histories": batch.views[1]}
        return {
            what: marked(packed, self._mended(packed, sampled=False), count)
            for what, packed in packs.items()
        }

    def view_states(self, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """`data`: the random view and the learned one, or two random ones."""
        if batch.views is None or not batch.num_pairs:
            return {}
        views = stack(self._views(batch))
        first, second = self._recommended(views, views.last).chunk(2)
        return {"data": (first, second)}

    def user_states(self, histories: Packed) -> Float[Tensor, "S D"]:
        """The state of each raw history's newest item; the augmenter plays no part."""
        return self._recommended(histories, histories.last)

    @property
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """The tied item table."""
        return self.encoder.item_vectors


def chosen_operations(
    logits: Float[Tensor, "N 3"], rule: Literal["sample", "argmax", "logit_times_uniform"]
) -> Int64[Tensor, " N"]:
    """One operation a slot, from torch's generator where the rule draws."""
    if rule == "argmax":
        return logits.argmax(dim=1)
    # In bfloat16 uniform draws would have 8 bits, too coarse for rare operations.
    logits = logits.float()
    draws = torch.rand_like(logits)
    if rule == "logit_times_uniform":
        return (logits * draws).argmax(dim=1)
    # The largest of the log-probabilities plus Gumbel noise is a draw by the probabilities.
    return (logits - torch.log(-torch.log(draws))).argmax(dim=1)


@contextmanager
def _evaluating(method: nn.Module) -> Iterator[None]:
    was_training = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(was_training)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
