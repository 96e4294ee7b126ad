"""What is still to read of all epochs, and what is already trained on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distrl.data.config import DataConfig
from distrl.errors import CheckpointError
from distrl.schema import Manifest, Shard

Ranges = list[tuple[int, int]]
"""Sorted, disjoint, half-open ranges of serials."""


class Ledger:
    """Serials of each (epoch, shard) that are trained on, as ranges.

    Serials are consumed almost in order, so a few ranges a unit hold any number of rows.
    """

    def __init__(self, store_hash: str) -> None:
        self.store_hash = store_hash
        self._units: dict[tuple[int, int], Ranges] = {}

    @property
    def total(self) -> int:
        """Samples trained on, over all epochs."""
        return sum(stop - start for ranges in self._units.values() for start, stop in ranges)

    def consumed(self, epoch: int, shard: int) -> Ranges:
        """What of a unit is trained on."""
        return list(self._units.get((epoch, shard), []))

    def consumed_count(self, epoch: int, shard: int) -> int:
        """How much of a unit is trained on."""
        return sum(stop - start for start, stop in self._units.get((epoch, shard), []))

    def add(self, epoch: np.ndarray, shard: np.ndarray, serial: np.ndarray) -> None:
        """Takes in samples, given by their places in the plan.

        Raises:
            ValueError: If one of them is in already.
        """
        order = np.lexsort((serial, shard, epoch))
        epoch, shard, serial = epoch[order], shard[order], serial[order]
        breaks = (np.diff(epoch) != 0) | (np.diff(shard) != 0) | (np.diff(serial) != 1)
        first = np.concatenate([[0], np.flatnonzero(breaks) + 1])[: len(serial)]
        last = np.concatenate([np.flatnonzero(breaks), [len(serial) - 1]])[: len(first)]
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            self._join((int(epoch[a]), int(shard[a])), [(int(serial[a]), int(serial[b]) + 1)])

    def merge(self, other: "Ledger") -> None:
        """Takes in another ledger of the same store.

        Raises:
            ValueError: If both hold the same sample: it would have been trained on twice.
        """
        for unit, ranges in other._units.items():
            self._join(unit, ranges)

    def _join(self, unit: tuple[int, int], more: Ranges) -> None:
        joined: Ranges = []
        for start, stop in sorted(self._units.get(unit, []) + more):
            if joined and start < joined[-1][1]:
                raise ValueError(
                    f"epoch {unit[0]}, shard {unit[1]}: samples {start} to "
                    f"{min(stop, joined[-1][1])} are in the ledger twice"
                )
            if joined and start == joined[-1][1]:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        self._units[unit] = joined

    def to_json(self) -> str:
        """As text that `from_json` reads back."""
        units = {f"{e}/{s}": ranges for (e, s), ranges in sorted(self._units.items())}
        return json.dumps({"store_manifest": self.store_hash, "units": units})

    @classmethod
    def from_json(cls, text: str, store_hash: str) -> "Ledger":
        """The ledger that `to_json` wrote.

        Raises:
            CheckpointError: If it is torn, or belongs to another store.
        """
        try:
            content = json.loads(text)
            ledger = cls(content["store_manifest"])
            for name, ranges in content["units"].items():
                epoch, _, shard = name.partition("/")
                ledger._units[int(epoch), int(shard)] = [(int(a), int(b)) for a, b in ranges]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the ledger of the checkpoint is torn: {error!r}") from error
        if ledger.store_hash != store_hash:
            raise CheckpointError(
                f"the checkpoint was trained on a store with manifest {ledger.store_hash[:12]}, "
                f"the store is now {store_hash[:12]}; resume with the store it began with"
            )
        return ledger


@dataclass(frozen=True, slots=True)
class UnitWork:
    """A unit with something left to read, and what of it to leave out."""

    epoch: int
    shard: int
    done: Ranges


def num_samples(shard: Shard, config: DataConfig) -> int:
    """Samples of one epoch of a shard."""
    return shard.prefixes if config.samples == "prefix" else shard.trainable_rows


def plan(
    manifest: Manifest, config: DataConfig, *, seed: int, epochs: int, ledger: Ledger
) -> list[UnitWork]:
    """The units still to read, epoch after epoch, each in an order that (seed, epoch) fixes."""
    return list(_units(manifest.sequences, config, seed, epochs, ledger))


def _units(
    shards: Sequence[Shard], config: DataConfig, seed: int, epochs: int, ledger: Ledger
) -> Iterator[UnitWork]:
    for epoch in range(epochs):
        for shard in np.random.default_rng((seed, epoch)).permutation(len(shards)).tolist():
            if ledger.consumed_count(epoch, shard) < num_samples(shards[shard], config):
                yield UnitWork(epoch, shard, ledger.consumed(epoch, shard))


def not_in(serials: np.ndarray, ranges: Ranges) -> np.ndarray:
    """Which serials lie in none of the ranges."""
    if not ranges:
        return np.ones(len(serials), dtype=bool)
    starts = np.array([start for start, _ in ranges])
    stops = np.array([stop for _, stop in ranges])
    before = np.searchsorted(starts, serials, side="right") - 1
    return (before < 0) | (serials >= stops[before])
