"""Samples of a store, as the stream serves them, made into batches."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt64

from distrl.contract import Batch, CorruptionRates, Damaged, Method, Neighbors, Packed
from distrl.data.beside import Beside
from distrl.data.config import DataConfig
from distrl.data.contrasted import contrasted_ends
from distrl.data.found import Found, no_neighbors
from distrl.data.neighbor_batch import drawn, neighbors_of
from distrl.data.side_tables import SideManifest
from distrl.ops.corruption import INSERT, Corruption
from distrl.ops.packing import pack
from distrl.ops.ragged import Ragged, appended
from distrl.ops.sequences import Views, mixed, sample_keys
from distrl.ops.substitution import substituted
from distrl.schema import PAD_ID

_PREFIX, _DAMAGE, _FIRST_SEMANTIC, _SECOND_SEMANTIC, _NEIGHBOR = 11, 13, 14, 15, 16
"""Purposes of draws, apart from those of the views."""

NOTHING = Beside()


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples with their place in the plan.

    A sample's items are its inputs followed by its newest target: a user's training part, or a
    prefix and the item that follows it.
    """

    epoch: Int64[np.ndarray, " n"]
    shard: Int64[np.ndarray, " n"]
    serial: Int64[np.ndarray, " n"]
    """Number within (epoch, shard), in the order in which that unit is served."""
    items: Ragged
    found: Found | None = None
    """Neighbors of the contrasted prefixes, sample by sample, as `contrasted_ends` orders those of
    each; None where none are wanted."""


@dataclass(frozen=True, slots=True)
class BatchMaker:
    """Makes a worker's batch of its samples. Thread-safe: nothing that it holds changes."""

    config: DataConfig
    num_views: Literal[0, 1, 2]
    num_items: int
    seed: int
    corruption: CorruptionRates | None = None
    correlated: Ragged | None = None
    """From `read_substitutes`; needed by views that substitute."""
    neighbors: SideManifest | None = None
    """Of the table that the samples' neighbors are from; None where none are wanted."""
    near_items: Ragged | None = None
    """From `read_near_items`; None where no semantic views are wanted."""
    draws_neighbor: bool = False
    """Whether a batch has one of the neighbors of each prefix, and not all."""

    @classmethod
    def of(
        cls,
        config: DataConfig,
        method: Method,
        num_items: int,
        seed: int,
        beside: Beside = NOTHING,
    ) -> "BatchMaker":
        """What makes the batches that a method wants."""
        return cls(
            config,
            method.num_views,
            num_items,
            seed,
            method.corruption,
            beside.correlated,
            beside.neighbors if method.wants_neighbors else None,
            beside.near_items if method.wants_semantic_views else None,
            method.wants_neighbors == "one",
        )

    @property
    def _contrasts(self) -> bool:
        semantic = self.neighbors is not None or self.near_items is not None
        return self.num_views > 0 or self.corruption is not None or semantic

    def make(self, samples: Samples) -> Batch:
        """Inputs, targets and views, packed. No samples make a batch without targets."""
        inputs, targets = _shifted(samples.items)
        if self.config.samples == "prefix":
            return self._prefixes(samples, inputs, targets)
        return self._all_positions(samples, inputs, targets)

    def _prefixes(self, samples: Samples, inputs: Ragged, targets: Ragged) -> Batch:
        """One target a sample; every sample is contrasted."""
        clean, _ = pack(inputs, self.config.slots)
        newest = targets.values[targets.offsets[1:] - 1]
        batch = Batch(clean, clean.last, torch.from_numpy(newest), None)
        if not self._contrasts:
            return batch
        keys = sample_keys(self.seed, samples.epoch, samples.shard, samples.serial)
        return self._with_pairs(batch, inputs, newest, keys, keys, clean.last, samples.found)

    def _all_positions(self, samples: Samples, inputs: Ragged, targets: Ragged) -> Batch:
        """A target at every position; some prefixes of each sample are contrasted."""
        max_len = self.config.max_len
        if self.config.long_sequences == "last":
            inputs, targets = inputs.newest(max_len), targets.newest(max_len)
        clean, slots = pack(windows(inputs, max_len), self.config.slots)
        batch = Batch(clean, torch.from_numpy(slots), torch.from_numpy(targets.values), None)
        if not self._contrasts:
            return batch
        keys = sample_keys(self.seed, samples.epoch, samples.shard, samples.serial)
        ends = contrasted_ends(inputs, keys, self.config.contrasted_prefixes)
        prefixes, pair_keys = self._contrasted(inputs, keys, ends)
        of_sample, at = keys[inputs.rows[ends]], torch.from_numpy(slots[ends])
        found = samples.found
        if found is not None:
            # They come sample by sample, pairs do not.
            found = found.take(np.argsort(np.argsort(inputs.rows[ends], kind="stable")))
        follows = targets.values[ends]
        return self._with_pairs(batch, prefixes, follows, pair_keys, of_sample, at, found)

    def _with_pairs(
        self,
        batch: Batch,
        prefixes: Ragged,
        follows: Int64[np.ndarray, " pairs"],
        keys: UInt64[np.ndarray, " pairs"],
        of_sample: UInt64[np.ndarray, " pairs"],
        at: Int64[torch.Tensor, " pairs"],
        found: Found | None,
    ) -> Batch:
        """The batch with what the method wants of its prefixes: views, damage, neighbors."""
        return replace(
            batch,
            views=self._views(prefixes, keys),
            damaged=self._damaged(prefixes, follows, keys),
            pair_sample=_numbers(of_sample),
            pair_target=torch.from_numpy(follows),
            pair_at=at,
            neighbors=self._neighbors(prefixes, keys, found),
            semantic_views=self._semantic_views(prefixes, keys),
        )

    def _neighbors(
        self, prefixes: Ragged, keys: UInt64[np.ndarray, " pairs"], found: Found | None
    ) -> Neighbors | None:
        if self.neighbors is None:
            return None
        if found is None:
            assert not len(prefixes.lengths), "the reader joins neighbors into samples"
            found = no_neighbors(self.neighbors.dimension)
        most, row_length = self.config.num_neighbors, self.config.slots
        if self.draws_neighbor:
            found, most = drawn(found, mixed(keys, _NEIGHBOR), most=most), 1
        return neighbors_of(found, prefixes, most=most, row_length=row_length)

    def _semantic_views(
        self, prefixes: Ragged, keys: UInt64[np.ndarray, " pairs"]
    ) -> tuple[Packed, Packed] | None:
        """Each prefix twice with some items replaced by near ones, apart from the other views."""
        if self.near_items is None:
            return None
        augment = self.config.augment
        first, second = (
            substituted(
                prefixes,
                mixed(keys, purpose),
                self.near_items,
                share=augment.semantic_share,
                draw=augment.semantic_draw,
                most=self.config.num_neighbors,
            )
            for purpose in (_FIRST_SEMANTIC, _SECOND_SEMANTIC)
        )
        return pack(first, self.config.slots)[0], pack(second, self.config.slots)[0]

    def _damaged(
        self,
        prefixes: Ragged,
        follows: Int64[np.ndarray, " pairs"],
        keys: UInt64[np.ndarray, " pairs"],
    ) -> Damaged | None:
        """Each prefix with the item that follows it, corrupted."""
        if self.corruption is None:
            return None
        rates, max_len = self.corruption, self.config.max_len
        corruption = Corruption(
            rates.keep, rates.delete, rates.insert, self.num_items, max_len, rates.max_inserted
        )
        whole = appended(prefixes, follows).newest(max_len)
        found = corruption.draw(whole, mixed(keys, _DAMAGE))
        packed, slots = pack(found.sequences, self.config.slots)
        operations = np.full(packed.items.numel(), -1, dtype=np.int64)
        operations[slots] = found.operations
        anchors = np.flatnonzero(found.operations == INSERT)
        missing = np.full((len(anchors), rates.max_inserted), PAD_ID, dtype=np.int64)
        gaps = found.inserted.take(anchors)
        missing[gaps.rows, gaps.positions] = gaps.values
        return Damaged(
            packed,
            torch.from_numpy(operations).view(packed.items.shape),
            torch.from_numpy(slots[anchors]),
            torch.from_numpy(missing),
        )

    def _contrasted(
        self,
        inputs: Ragged,
        keys: UInt64[np.ndarray, " n"],
        ends: Int64[np.ndarray, " pairs"],
    ) -> tuple[Ragged, UInt64[np.ndarray, " pairs"]]:
        """The prefixes that end there, with a key for each."""
        lengths = inputs.positions[ends] + 1
        shown = np.minimum(lengths, self.config.max_len)
        keys = mixed(mixed(keys[inputs.rows[ends]], _PREFIX), lengths)
        return inputs.pieces(ends - shown + 1, shown), keys

    def _views(
        self, sequences: Ragged, keys: UInt64[np.ndarray, " pairs"]
    ) -> tuple[Packed, Packed] | None:
        if not self.num_views:
            return None
        augment = self.config.augment
        mask_id = PAD_ID if augment.mask_with == "pad" else self.num_items + 1
        views = Views(
            augment.operations,
            augment.crop_ratio,
            augment.mask_ratio,
            augment.reorder_ratio,
            augment.distinct,
            mask_id,
            augment.substitute_ratio,
            augment.substitute_among,
            self.correlated,
        )
        first, second = views.draw(sequences, keys)
        second = second if self.num_views == 2 else sequences
        return pack(first, self.config.slots)[0], pack(second, self.config.slots)[0]


def _numbers(keys: UInt64[np.ndarray, " pairs"]) -> Int64[torch.Tensor, " pairs"]:
    """Keys of samples as torch can hold them."""
    return torch.from_numpy(keys.view(np.int64))


def windows(inputs: Ragged, max_len: int) -> Ragged:
    """Rows cut into consecutive windows of at most `max_len`, the newest one full."""
    lengths = inputs.lengths
    count = -(-lengths // max_len)
    rows = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    oldest = lengths - (count - 1) * max_len
    sizes = np.where(number == 0, oldest[rows], max_len)
    return Ragged(inputs.values, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _shifted(items: Ragged) -> tuple[Ragged, Ragged]:
    """Each row without its newest item, and without its oldest."""
    is_newest = np.zeros(len(items.values), dtype=bool)
    is_oldest = np.zeros(len(items.values), dtype=bool)
    is_newest[items.offsets[1:] - 1] = True
    is_oldest[items.offsets[:-1]] = True
    return items.keep(~is_newest), items.keep(~is_oldest)


def empty_batch(maker: BatchMaker) -> Batch:
    """A batch without targets, for a rank that has run out while others have not."""
    nothing = np.zeros(0, dtype=np.int64)
    return maker.make(Samples(nothing, nothing, nothing, Ragged.of([])))
