"""What a training carries from step to step and keeps in a checkpoint: weights, optimizers, ledger.

Knows no Ray: the same in one process as on many workers.
"""

import json
from pathlib import Path

import torch

from distrl.config import RunConfig
from distrl.contract import Catalog
from distrl.data.plan import Ledger
from distrl.engine import checkpoint
from distrl.engine.collectives import gather_objects, rank, world_size
from distrl.engine.zero import Engines
from distrl.methods import build
from distrl.schema import Manifest
from distrl.train.loop import Step
from distrl.train.saved import RUN_FILE

LEDGER_FILE = "ledger.json"
PROGRESS_FILE = "progress.json"


def rows_per_epoch(run: RunConfig, manifest: Manifest) -> int:
    """Samples of one epoch: prefixes in the papers' protocol, otherwise users with a target."""
    prefix = run.data.samples == "prefix"
    return manifest.num_prefixes if prefix else manifest.num_trainable_rows


class TrainingState:
    """The method in its engines, and what of the store it was trained on.

    Every rank of the process group, which exists already, has one.
    """

    def __init__(
        self, run: RunConfig, manifest: Manifest, store_hash: str, device: torch.device
    ) -> None:
        """Draws the weights that the seed says, the same on every rank. Collective.

        Args:
            run: What is trained.
            manifest: Of the store that it is trained on.
            store_hash: Of the manifest.
            device: Where.

        Raises:
            ConfigError: If a learning rate is meant for a part that does not exist.
        """
        self.run, self.store_hash = run, store_hash
        self.rows_per_epoch = rows_per_epoch(run, manifest)
        torch.manual_seed(run.seed)
        self.method = build(run.method, Catalog(manifest.num_items, run.data.max_len)).train()
        self.engines = Engines(
            self.method,
            run.engine,
            device=device,
            micro_batch_size=run.data.batch_size // world_size(),
            num_workers=world_size(),
        )
        self.ledger, self._new = Ledger(self.store_hash), Ledger(self.store_hash)
        self.step = 0
        """Steps taken, before a restart too."""

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint in a folder on this machine. Collective.

        Raises:
            CheckpointError: If it is torn, or of another method, optimizer or store.
        """
        checkpoint.load(self.engines, folder)
        self.ledger = Ledger.from_json((folder / LEDGER_FILE).read_text(), self.store_hash)
        self.step = json.loads((folder / PROGRESS_FILE).read_text())["step"]

    def took(self, done: Step) -> None:
        """Takes note of a step."""
        self.step = done.step
        if done.consumed is not None:
            self._new.add(done.consumed.epoch, done.consumed.shard, done.consumed.serial)

    @property
    def trained(self) -> int:
        """Samples that this rank knows to be trained on: all of them, where it is the only one."""
        return self.ledger.total + self._new.total

    def has_news(self) -> bool:
        """Whether any rank trained on something since the last checkpoint. Collective."""
        return any(gather_objects(self._new.total))

    def save(self, folder: Path) -> float:
        """Commits weights, optimizers and ledger together; rank 0 writes. Collective.

        Returns:
            Epochs trained, counted in rows.

        Raises:
            CheckpointError: If rank 0 cannot write.
        """
        for other in gather_objects(self._new):
            self.ledger.merge(other)
        self._new = Ledger(self.store_hash)
        checkpoint.save(self.engines, folder)
        epoch = self.ledger.total / self.rows_per_epoch
        if rank() == 0:
            (folder / LEDGER_FILE).write_text(self.ledger.to_json())
            (folder / PROGRESS_FILE).write_text(json.dumps({"step": self.step, "epoch": epoch}))
            (folder / RUN_FILE).write_text(self.run.model_dump_json(indent=1))
        return epoch
