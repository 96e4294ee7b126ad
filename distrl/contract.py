"""What a method, the stream and the engines agree on.

Dimensions: R rows of L slots, S segments, T targets, P contrasted pairs, D hidden, V items.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Packed:
    """S sequences laid end to end into R rows of L slots, nothing padded to the maximum length.

    A segment never crosses a row. Slots past a row's last segment are padding.
    """

    items: Int64[Tensor, "R L"]
    """Item ids; PAD_ID in padding, and where the mask augmentation hides an item."""
    segment: Int64[Tensor, "R L"]
    """Number of the segment a slot belongs to, 0..S-1; -1 in padding."""
    position: Int64[Tensor, "R L"]
    """Place within its segment, 0 for the oldest; 0 in padding."""
    last: Int64[Tensor, " S"]
    """Flat index (row * L + slot) of the newest slot of each segment, in segment order."""

    def to(self, device: torch.device | str) -> "Packed":
        """The same sequences on another device."""
        return Packed(
            *(
                t.to(device, non_blocking=True)
                for t in (self.items, self.segment, self.position, self.last)
            )
        )


@dataclass(frozen=True, slots=True)
class CorruptionRates:
    """How sequences are damaged for a method that learns to mend them.

    At each item of a sequence one of three things is drawn: it stays, it is deleted, or a random
    item is put in front of it and the draw is repeated.
    """

    keep: float
    delete: float
    insert: float
    max_inserted: int
    """Items deleted in a row at most, which are the most that one gap gets back."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """C sequences after random corruption, and what would undo it. A anchors, K = max_inserted."""

    sequences: Packed
    operations: Int64[Tensor, "R L"]
    """What mends each slot: 0 keep, 1 delete, 2 insert items in front of it; -1 in padding."""
    anchor_at: Int64[Tensor, " A"]
    """Flat index of each slot in front of which items are missing."""
    missing: Int64[Tensor, "A K"]
    """Those items, the nearest to the slot first, then PAD_ID."""

    def count(self, unit: Literal["token", "missing"]) -> int:
        """Slots with an item; or missing items and, behind all but the longest gaps, an end."""
        if unit == "token":
            return int((self.operations >= 0).sum())
        width = self.missing.shape[1]
        lengths = (self.missing != 0).sum(dim=1)
        return int((lengths + (lengths < width)).sum())

    def to(self, device: torch.device | str) -> "Damaged":
        """The same sequences on another device."""
        rest = (self.operations, self.anchor_at, self.missing)
        return Damaged(self.sequences.to(device), *(t.to(device, non_blocking=True) for t in rest))


@dataclass(frozen=True, slots=True)
class Neighbors:
    """What P contrasted prefixes are like by their texts. U different neighbors, at most K each."""

    anchors: Packed
    """The prefixes themselves."""
    sequences: Packed
    """Sequences that hold the neighbors; a neighbor that is the beginning of another has no segment
    of its own, so `last` has an entry a neighbor (U) and not a segment."""
    of_pair: Int64[Tensor, "P K"]
    """Which neighbors each prefix has, the nearest first, then -1."""
    text: Float[Tensor, "P E"]
    """Vectors of the prefixes' texts."""
    neighbor_text: Float[Tensor, "U E"]
    """Vectors of the neighbors' texts."""

    def to(self, device: torch.device | str) -> "Neighbors":
        """The same neighbors on another device."""
        rest = (self.of_pair, self.text, self.neighbor_text)
        moved = (tensor.to(device, non_blocking=True) for tensor in rest)
        return Neighbors(self.anchors.to(device), self.sequences.to(device), *moved)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one worker trains on in one step."""

    clean: Packed
    """Input sequences."""
    target_at: Int64[Tensor, " T"]
    """Flat index into `clean` of the state that predicts each target."""
    targets: Int64[Tensor, " T"]
    """The item that follows, 1..V."""
    views: tuple[Packed, Packed] | None
    """Two views of the same P prefixes, row-aligned by segment number; None for methods that take
    none. Both are augmented, or, for a method that wants one, only the first, and the second is
    the prefix itself."""
    pair_sample: Int64[Tensor, " P"] | None = None
    """The sample that each pair is of, as a number that no other sample of the run has."""
    pair_target: Int64[Tensor, " P"] | None = None
    """The item that follows each contrasted prefix."""
    pair_at: Int64[Tensor, " P"] | None = None
    """Flat index into `clean` of the newest slot of each contrasted prefix."""
    damaged: Damaged | None = None
    """The contrasted prefixes with the items that follow them, corrupted; None for methods that do
    not mend."""
    neighbors: Neighbors | None = None
    """Of the contrasted prefixes; None for methods that take none."""
    semantic_views: tuple[Packed, Packed] | None = None
    """Two views of the contrasted prefixes in which items became others with a like text."""

    @property
    def num_targets(self) -> int:
        """Next-item targets in this batch."""
        return self.targets.shape[0]

    @property
    def num_pairs(self) -> int:
        """Contrasted pairs in this batch; a single one has no negatives and counts as none."""
        pairs = 0
        views = self.views or self.semantic_views
        if views is not None:
            pairs = views[0].last.shape[0]
        elif self.neighbors is not None:
            pairs = self.neighbors.anchors.last.shape[0]
        return pairs if pairs > 1 else 0

    def count(self, unit: "Unit") -> int:
        """How many of what a term is a mean over this batch holds; 1 for a sum."""
        if unit == "target":
            return self.num_targets
        if unit == "pair":
            return self.num_pairs
        if unit == "sum":
            return 1
        return 0 if self.damaged is None else self.damaged.count(unit)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def moved(numbers: Tensor | None) -> Tensor | None:
            return None if numbers is None else numbers.to(device, non_blocking=True)

        def both(views: tuple[Packed, Packed] | None) -> tuple[Packed, Packed] | None:
            return None if views is None else (views[0].to(device), views[1].to(device))

        return Batch(
            self.clean.to(device),
            self.target_at.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            both(self.views),
            moved(self.pair_sample),
            moved(self.pair_target),
            moved(self.pair_at),
            None if self.damaged is None else self.damaged.to(device),
            None if self.neighbors is None else self.neighbors.to(device),
            both(self.semantic_views),
        )


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimizer step on one batch.

    A part is a sub-module with its own optimizer state, which it keeps from phase to phase. Parts
    a phase does not train stay exactly as they are.
    """

    name: str
    trains: tuple[str, ...]
    """Names of the parts it moves. Parts that always move together should be one part."""


Mark = Literal["kept", "deleted", "inserted"]
"""What a method did with an item of a sequence."""

Unit = Literal["target", "pair", "token", "missing", "sum"]
"""What a term is a mean over, which decides its share when workers hold unequal batches: targets,
pairs, slots of damaged sequences, items missing in them; or a sum, which no worker shares."""

MEAN_UNITS: tuple[Unit, ...] = ("target", "pair", "token", "missing")


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a phase's loss."""

    weight: float
    value: Float[Tensor, ""]
    """Mean, or sum, over this worker's share of the unit, in nats; zero where there are none."""
    unit: Unit


@dataclass(frozen=True, slots=True)
class Losses:
    """The weighted terms of one phase on one worker's batch."""

    terms: Mapping[str, Term]

    def total(self, shares: Mapping[Unit, float]) -> Float[Tensor, ""]:
        """Sum of weight * share * value over the terms.

        Args:
            shares: For each unit, this worker's count divided by the mean count per worker, and
                the number of workers for sums. The mean of the totals over workers is then the mean
                over all targets and pairs, and the sum over all, however unequal the batches are.
                1.0 on a single worker.
        """
        parts = [term.weight * shares[term.unit] * term.value for term in self.terms.values()]
        return torch.stack(parts).sum()


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a method must know of the data to build itself."""

    num_items: int
    max_len: int


def _own(rows: Tensor) -> Tensor:
    """What a worker gathers that is alone."""
    return rows


class Method(nn.Module, ABC):
    """A paper: its parts, its phases, and the loss of each phase. Knows no vendor."""

    num_views: Literal[0, 1, 2] = 0
    """Augmented views it wants in each batch; see `Batch.views`."""

    corruption: CorruptionRates | None = None
    """How the batch's prefixes are damaged for it; None where it does not mend."""

    wants_neighbors: Literal["one", "all"] | None = None
    """Whether each batch brings the neighbors of its contrasted prefixes: all of
    `data.num_neighbors`, or one of those, drawn anew each epoch."""

    wants_semantic_views: bool = False
    """Whether each batch brings two views with items replaced by others with a like text."""

    gather: Callable[[Tensor], Tensor] = staticmethod(_own)
    """Rows of a tensor of this worker's pairs to those of all workers' pairs, with gradients; who
    runs several workers sets it. Collective: a method calls it on every batch or on none."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """Sub-modules with an optimizer of their own, by name; together all parameters."""

    @abstractmethod
    def phases(self, epoch: int) -> Sequence[Phase]:
        """The optimizer steps taken on each batch of this epoch, in order."""

    @abstractmethod
    def forward(self, batch: Batch, phase: Phase) -> Losses:
        """The loss of one phase. Gradients reach the parts that the phase trains, no others."""

    def can_rank(self, epoch: int) -> bool:
        """Whether what this epoch trains is worth ranking with: always, unless overridden."""
        return True

    def judged(self, batch: Batch) -> Mapping[str, float]:
        """Figures of the method's own on held-out sequences: none unless overridden.

        In evaluation mode; the same on all workers, which all hold the same batch.
        """
        return {}

    def examples(
        self, batch: Batch, count: int
    ) -> Mapping[str, Sequence[Sequence[tuple[int, Mark]]]]:
        """Sequences as the method mends them, by what they are, for people to look at.

        None unless overridden. In evaluation mode; at most `count` of each.
        """
        return {}

    def heed(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Takes note of what was judged after an epoch, on all workers alike.

        What it remembers belongs into buffers, which checkpoints keep. Overridden where the phases
        of later epochs depend on it.
        """

    def view_states(self, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Pairs of views (P D) by name, row-aligned, for looking at: none unless overridden.

        Deterministic if the method is in evaluation mode; carries gradients only if asked to.
        """
        return {}

    @abstractmethod
    def user_states(self, histories: Packed) -> Float[Tensor, "S D"]:
        """One vector a history; its dot product with a row of `item_vectors` is a score."""

    @property
    @abstractmethod
    def item_vectors(self) -> Float[Tensor, "V1 D"]:
        """Vectors of items 0..V, row by item id; row 0 is PAD and must never be recommended."""
