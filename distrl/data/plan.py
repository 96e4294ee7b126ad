"""What is still to read of all epochs, and what is already trained on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from distrl.data.config import DataConfig
from distrl.errors import CheckpointError
from distrl.ops.sequences import mixed, permutation, seed_key
from distrl.schema import Manifest, Shard

Ranges = list[tuple[int, int]]
"""Sorted, disjoint, half-open ranges of serials that do not touch."""


class Ledger:
    """Serials of each unit, an epoch of a shard, that are trained on, as ranges.

    Serials are consumed almost in order, so a few ranges a unit hold any number of samples, and
    those of a finished unit are one.
    """

    def __init__(self, store_hash: str) -> None:
        self.store_hash = store_hash
        self._units: dict[tuple[int, int], Ranges] = {}

    @property
    def total(self) -> int:
        """Samples trained on, over all epochs."""
        return sum(map(_size, self._units.values()))

    @property
    def units(self) -> list[tuple[int, int]]:
        """(epoch, shard) of the units of which anything is trained on, in order."""
        return sorted(self._units)

    def consumed(self, epoch: int, shard: int) -> Ranges:
        """What of a unit is trained on."""
        return list(self._units.get((epoch, shard), []))

    def consumed_count(self, epoch: int, shard: int) -> int:
        """How much of a unit is trained on."""
        return _size(self._units.get((epoch, shard), []))

    def add(
        self,
        epoch: Int64[np.ndarray, " n"],
        shard: Int64[np.ndarray, " n"],
        serial: Int64[np.ndarray, " n"],
    ) -> None:
        """Takes in samples, given by their places in the plan, in any order.

        Raises:
            ValueError: If one of them is in already; nothing is taken in then.
        """
        order = np.lexsort((serial, shard, epoch))
        epoch, shard, serial = epoch[order], shard[order], serial[order]
        new_unit = (np.diff(epoch) != 0) | (np.diff(shard) != 0)
        starts = np.flatnonzero(np.r_[len(serial) > 0, new_unit | (np.diff(serial) != 1)])
        stops = np.r_[starts[1:], len(serial)][: len(starts)] - 1
        ranges = zip(
            epoch[starts].tolist(),
            shard[starts].tolist(),
            serial[starts].tolist(),
            (serial[stops] + 1).tolist(),
            strict=True,
        )
        by_unit = groupby(ranges, key=lambda one: one[:2])
        self._take({unit: [one[2:] for one in more] for unit, more in by_unit})

    def merge(self, other: "Ledger") -> None:
        """Takes in another ledger of the same store.

        Raises:
            ValueError: If both hold the same sample, which would have been trained on twice;
                nothing is taken in then.
        """
        self._take(other._units)

    def _take(self, more: dict[tuple[int, int], Ranges]) -> None:
        joined = {
            unit: _joined(unit, self._units.get(unit, []), ranges) for unit, ranges in more.items()
        }
        self._units.update(joined)

    def to_json(self) -> str:
        """As text that `from_json` reads back; epochs that are alike, as finished ones, are one."""
        epochs: dict[int, dict[str, Ranges]] = {}
        for epoch, shard in self.units:
            epochs.setdefault(epoch, {})[str(shard)] = self._units[epoch, shard]
        alike = []
        for epoch, shards in epochs.items():
            if alike and alike[-1]["last"] == epoch - 1 and alike[-1]["shards"] == shards:
                alike[-1]["last"] = epoch
            else:
                alike.append({"first": epoch, "last": epoch, "shards": shards})
        return json.dumps({"store_manifest": self.store_hash, "epochs": alike})

    @classmethod
    def from_json(cls, text: str, store_hash: str) -> "Ledger":
        """The ledger that `to_json` wrote.

        Raises:
            CheckpointError: If it is torn, or belongs to another store.
        """
        try:
            content = json.loads(text)
            ledger = cls(content["store_manifest"])
            for alike in content["epochs"]:
                for epoch in range(alike["first"], alike["last"] + 1):
                    for shard, ranges in alike["shards"].items():
                        ledger._units[epoch, int(shard)] = _checked(ranges)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the ledger of the checkpoint is torn: {error!r}") from error
        if ledger.store_hash != store_hash:
            raise CheckpointError(
                f"the checkpoint was trained on a store with manifest {ledger.store_hash[:12]}, "
                f"the store is now {store_hash[:12]}; resume with the store it began with"
            )
        return ledger


def _size(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _joined(unit: tuple[int, int], some: Ranges, more: Ranges) -> Ranges:
    joined: Ranges = []
    for start, stop in sorted(some + more):
        if joined and start < joined[-1][1]:
            raise ValueError(
                f"epoch {unit[0]}, shard {unit[1]}: samples {start} to "
                f"{min(stop, joined[-1][1]) - 1} are in the ledger twice"
            )
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _checked(ranges: Any) -> Ranges:  # noqa: ANN401
    """Ranges out of JSON, if that is what they are."""
    pairs = [(start, stop) for start, stop in ranges]
    ends = [end for pair in pairs for end in pair]
    if not all(type(end) is int for end in ends) or ends != sorted(set(ends)):
        raise ValueError(f"{ranges} are not ranges that rise")
    return pairs


@dataclass(frozen=True, slots=True)
class UnitWork:
    """A unit with something left to read, and what of it to leave out."""

    epoch: int
    shard: int
    done: Ranges
    first: bool
    """The plan reads this shard for the first time."""


def num_samples(shard: Shard, config: DataConfig) -> int:
    """Samples of one epoch of a shard."""
    return shard.prefixes if config.samples == "prefix" else shard.trainable_rows


def plan(
    manifest: Manifest, config: DataConfig, *, seed: int, epochs: int, ledger: Ledger
) -> list[UnitWork]:
    """The units still to read, epoch after epoch, each in an order that (seed, epoch) fixes.

    Raises:
        CheckpointError: If the ledger holds samples that the store does not have.
    """
    _check(ledger, manifest, config)
    return list(_units(manifest, config, seed, epochs, ledger))


def _units(
    manifest: Manifest, config: DataConfig, seed: int, epochs: int, ledger: Ledger
) -> Iterator[UnitWork]:
    sizes = [num_samples(shard, config) for shard in manifest.sequences]
    seen: set[int] = set()
    for epoch in range(epochs):
        for shard in permutation(len(sizes), mixed(seed_key(seed), epoch)).tolist():
            done = ledger.consumed(epoch, shard)
            if _size(done) < sizes[shard]:
                yield UnitWork(epoch, shard, done, shard not in seen)
                seen.add(shard)


def _check(ledger: Ledger, manifest: Manifest, config: DataConfig) -> None:
    for epoch, shard in ledger.units:
        known = shard < len(manifest.sequences)
        size = num_samples(manifest.sequences[shard], config) if known else 0
        last = ledger.consumed(epoch, shard)[-1][1]
        if last > size:
            raise CheckpointError(
                f"the checkpoint's ledger holds sample {last - 1} of epoch {epoch}, shard {shard}, "
                f"which has {size} with data.samples={config.samples}; resume with the data "
                "settings it began with"
            )


def not_in(serials: Int64[np.ndarray, " n"], ranges: Ranges) -> Bool[np.ndarray, " n"]:
    """Which serials lie in none of the ranges."""
    if not ranges:
        return np.ones(len(serials), dtype=bool)
    starts, stops = np.array(ranges, dtype=np.int64).T
    before = np.searchsorted(starts, serials, side="right") - 1
    return (before < 0) | (serials >= stops[before])
