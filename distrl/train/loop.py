"""The training loop: for batch, for phase, step; then report. Knows no Ray."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrl.contract import MEAN_UNITS, Batch, Method, Unit
from distrl.data.stream import Consumed
from distrl.engine.collectives import gather_objects, rank, sum_over_ranks, world_size
from distrl.engine.zero import Engines
from distrl.errors import DistrlError


@dataclass(frozen=True, slots=True)
class Step:
    """What all workers together did in one step."""

    step: int
    """Steps taken since the run began, this one included."""
    samples: int
    """Samples of the store that all workers took."""
    targets: int
    """Next-item targets of all workers."""
    consumed: Consumed | None
    """What this worker took; None where it has run out."""
    stop: bool
    """A worker asked for the end of training."""
    save: bool = False
    """A worker asked for a checkpoint."""


@dataclass(slots=True)
class Curves:
    """Loss terms summed over this worker's targets and pairs since they were last read.

    Of a term that is a sum, the curve is the sum over all workers, a step's mean.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(
        self, phase: str, terms: dict[str, Tensor], batch: Batch, units: dict[str, Unit]
    ) -> None:
        """Takes one phase's terms in; nothing is copied off the device."""
        for name, value in terms.items():
            unit = units.get(name, "target")
            count, key = batch.count(unit), f"{phase}/{name}"
            self.sums[key] = self.sums.get(key, 0.0) + value * count
            self.counts[key] += 1 / world_size() if unit == "sum" else count

    def read(self) -> dict[str, float]:
        """Means over all workers, and a fresh start. Collective."""
        mine = {key: (float(total), self.counts[key]) for key, total in self.sums.items()}
        self.sums, self.counts = {}, defaultdict(float)
        merged: dict[str, tuple[float, float]] = {}
        for worker in gather_objects(mine):
            for key, (total, count) in worker.items():
                before = merged.get(key, (0.0, 0.0))
                merged[key] = (before[0] + total, before[1] + count)
        return {key: total / count for key, (total, count) in merged.items() if count}


@dataclass(slots=True)
class Wishes:
    """What one worker, which learns of the time or of the monitor, wants all to do."""

    stop: bool = False
    """End training."""
    save: bool = False
    """Commit a checkpoint."""


def step_seed(seed: int, step: int, worker: int) -> int:
    """Seed of the dropout of one step on one worker: the same after a restart."""
    digest = hashlib.blake2b(f"{seed}/{step}/{worker}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def steps(
    method: Method,
    engines: Engines,
    batches: Iterator[tuple[Batch, Consumed]],
    *,
    empty: Batch,
    already_consumed: int,
    curves: Curves,
    seed: int,
    first_step: int,
    rows_per_epoch: int,
    wishes: Wishes,
) -> Iterator[Step]:
    """Trains on every batch and yields after each, until all workers have run out.

    Collective: all ranks take the same steps. A rank that has run out while others have not
    trains on `empty`, whose loss is zero, so that no rank waits for it in a collective.

    Args:
        method: The module that the engines wrap.
        engines: One a part.
        batches: This worker's share of the stream, with the samples each batch consumed.
        empty: A batch without targets.
        already_consumed: Samples that all workers consumed before.
        curves: Takes in the loss terms.
        seed: Of the run.
        first_step: Steps already taken, by this process or by one before a restart.
        rows_per_epoch: Samples of the store in an epoch.
        wishes: Read once a step; one worker's wish is carried out by all after the next one.

    Raises:
        DivergedError: On all ranks, if any rank's loss is not finite.
        DistrlError: On all ranks, what any rank's stream raised.
    """
    step, consumed_before = first_step, already_consumed
    while True:
        (batch, consumed), error = _next(batches, empty)
        taken = 0 if consumed is None else len(consumed.serial)
        mine = {unit: batch.count(unit) for unit in MEAN_UNITS}
        samples, stops, saves, errors, *totals = sum_over_ranks(
            [taken, wishes.stop, wishes.save, bool(error), *mine.values()]
        )
        everyone = dict(zip(MEAN_UNITS, totals, strict=True))
        if errors:
            raise next(found for found in gather_objects(error) if found is not None)
        if samples == 0:
            return
        shares: dict[Unit, float] = {
            unit: mine[unit] * world_size() / max(everyone[unit], 1.0) for unit in MEAN_UNITS
        }
        shares["sum"] = world_size()
        torch.manual_seed(step_seed(seed, step, rank()))
        engines.set_epoch(consumed_before / rows_per_epoch)
        for phase in method.phases(int(consumed_before // rows_per_epoch)):
            terms = engines.step(batch, phase, shares, step=step)
            curves.add(phase.name, terms, batch, engines.units)
        step, consumed_before = step + 1, consumed_before + int(samples)
        targets = int(everyone["target"])
        yield Step(step, int(samples), targets, consumed, stops > 0, saves > 0)


def _next(
    batches: Iterator[tuple[Batch, Consumed]], empty: Batch
) -> tuple[tuple[Batch, Consumed | None], DistrlError | None]:
    """The next batch, the empty one where there is none, and what went wrong on the way to it."""
    try:
        return next(batches, (empty, None)), None
    except DistrlError as error:
        return (empty, None), error
