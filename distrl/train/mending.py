"""How well a method mends held-out sequences, judged by every worker on the same ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from distrl.config import RunConfig
from distrl.contract import Batch, Mark
from distrl.data.samples import BatchMaker, Samples
from distrl.engine.collectives import gather_objects
from distrl.ops.ragged import Ragged
from distrl.schema import Manifest
from distrl.train.reading import ragged, shard_batches
from distrl.train.state import TrainingState

HELD_OUT_USERS = 512
EXAMPLES = 20
HELD_OUT_EPOCH = 2**31 - 1
"""Names the draws of the held-out damage, which no epoch of training has."""


class MendingProbe:
    """Holds the same damaged sequences through a whole run, and after a restart.

    They are training parts with the validation target behind them, of the first users of the first
    shards: their newest item and their damage are in no training batch.
    """

    def __init__(self, state: TrainingState, manifest: Manifest, maker: BatchMaker) -> None:
        """Reads the sequences, where the method mends any.

        Args:
            state: Of the run.
            manifest: Of its store.
            maker: Of its batches; held-out views are drawn by the same settings.

        Raises:
            SchemaError: If a shard is torn.
            StorageError: If it cannot be read.
        """
        self._state = state
        self._batch = None
        if state.method.corruption is not None:
            whole = maker.config.model_copy(update={"samples": "prefix"})
            batch = held_out_batch(state.run, manifest, replace(maker, config=whole))
            self._batch = batch.to(state.engines.device)

    def judge(self, epoch: int) -> Mapping[str, float]:
        """Figures of the method after an epoch, which it also heeds. The same on all. Collective.

        Draws nothing that training would have drawn, moves no weight.
        """
        if self._batch is None:
            return {}
        method, before = self._state.method, torch.get_rng_state()
        method.eval()
        try:
            torch.manual_seed(self._state.run.seed)
            with self._state.engines.gathered():
                figures = gather_objects(method.judged(self._batch))[0]
        finally:
            method.train()
            torch.set_rng_state(before)
        method.heed(epoch, figures)
        return figures

    def examples(self) -> Mapping[str, Sequence[Sequence[tuple[int, Mark]]]]:
        """Some of the sequences as the method mends them. Collective at ZeRO 3."""
        if self._batch is None:
            return {}
        method = self._state.method
        method.eval()
        try:
            with self._state.engines.gathered():
                return method.examples(self._batch, EXAMPLES)
        finally:
            method.train()


def held_out_batch(run: RunConfig, manifest: Manifest, maker: BatchMaker) -> Batch:
    """The sequences of some users without their test item, as one batch.

    Raises:
        SchemaError: If a shard is torn.
        StorageError: If it cannot be read.
    """
    sequences = _first_sequences(run.data.store_uri, manifest)
    is_test = np.zeros(len(sequences.values), dtype=bool)
    is_test[sequences.offsets[1:] - 1] = True
    items = sequences.keep(~is_test).newest(run.data.max_len + 1)
    serial = np.arange(len(items.lengths))
    epoch, shard = np.full_like(serial, HELD_OUT_EPOCH), np.zeros_like(serial)
    return maker.make(Samples(epoch, shard, serial, items))


def _first_sequences(store_uri: str, manifest: Manifest) -> Ragged:
    """Sequences of at least three items, from the first shards."""
    rows: list[list[int]] = []
    batches = (
        batch
        for shard in manifest.sequences
        for batch in shard_batches(store_uri, shard, HELD_OUT_USERS, ["items"])
    )
    for batch in batches:
        read = ragged(batch.column("items"))  # pyright: ignore[reportArgumentType]
        long = read.take(np.flatnonzero(read.lengths > 2))
        rows += [row.tolist() for row in np.split(long.values, long.offsets[1:-1])]
        if len(rows) >= HELD_OUT_USERS:
            break
    return Ragged.of(rows[:HELD_OUT_USERS])
