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
class Batch:
    """What one worker trains on in one step."""

    clean: Packed
    """Input sequences."""
    target_at: Int64[Tensor, " T"]
    """Flat index into `clean` of the state that predicts each target."""
    targets: Int64[Tensor, " T"]
    """The item that follows, 1..V."""
    views: tuple[Packed, Packed] | None
    """Two augmented views of the same P prefixes, row-aligned by segment number; None for methods
    that take none."""
    pair_sample: Int64[Tensor, " P"] | None = None
    """The sample that each pair is of, as a number that no other sample of the run has."""
    pair_target: Int64[Tensor, " P"] | None = None
    """The item that follows each contrasted prefix."""

    @property
    def num_targets(self) -> int:
        """Next-item targets in this batch."""
        return self.targets.shape[0]

    @property
    def num_pairs(self) -> int:
        """Contrasted pairs in this batch; a single one has no negatives and counts as none."""
        pairs = 0 if self.views is None else self.views[0].last.shape[0]
        return pairs if pairs > 1 else 0

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        views = None if self.views is None else (self.views[0].to(device), self.views[1].to(device))
        return Batch(
            self.clean.to(device),
            self.target_at.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            views,
            *(
                None if numbers is None else numbers.to(device, non_blocking=True)
                for numbers in (self.pair_sample, self.pair_target)
            ),
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


Unit = Literal["target", "pair"]
"""What a term is a mean over; decides its share when workers hold unequal batches."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a phase's loss."""

    weight: float
    value: Float[Tensor, ""]
    """Mean over this worker's targets or pairs, in nats; zero where there are none."""
    unit: Unit


@dataclass(frozen=True, slots=True)
class Losses:
    """The weighted terms of one phase on one worker's batch."""

    terms: Mapping[str, Term]

    def total(self, shares: Mapping[Unit, float]) -> Float[Tensor, ""]:
        """Sum of weight * share * value over the terms.

        Args:
            shares: For each unit, this worker's count divided by the mean count per worker. The
                mean of the totals over workers is then the mean over all targets and pairs, however
                unequal the batches are. 1.0 on a single worker.
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

    num_views: Literal[0, 2] = 0
    """Augmented views it wants in each batch."""

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
