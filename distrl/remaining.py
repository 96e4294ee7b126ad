"""What a run has still to train on, asked anew whenever its workers start."""

import json
from dataclasses import dataclass

import ray.data

from distrl.config import RunConfig
from distrl.data.plan import Ledger
from distrl.data.side_tables import SideManifest
from distrl.data.stream import training_dataset
from distrl.errors import CheckpointError
from distrl.folder import RunFolder
from distrl.schema import Manifest
from distrl.storage import join, read_bytes
from distrl.train.state import LEDGER_FILE

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train keeps which checkpoint it will hand to the workers."""


def committed_ledger(run_uri: str, store_hash: str) -> Ledger:
    """The ledger of the checkpoint that Ray will hand to a worker group that starts now.

    Not of the newest folder on storage: its upload may have finished after Ray took stock, and
    then the rows between the two checkpoints would be lost.

    Raises:
        CheckpointError: If the checkpoint's ledger is missing or belongs to another store.
        StorageError: If the run's folder cannot be read.
    """
    folder = RunFolder(run_uri)
    if not folder.has(SNAPSHOT):
        return Ledger(store_hash)
    latest = json.loads(folder.read(SNAPSHOT))["latest_checkpoint_result"]
    if latest is None:
        return Ledger(store_hash)
    name = latest["checkpoint_dir_name"]
    if not folder.has(f"{name}/{LEDGER_FILE}"):
        raise CheckpointError(f"{join(run_uri, name, LEDGER_FILE)} is missing: a torn checkpoint")
    return Ledger.from_json(read_bytes(join(run_uri, name, LEDGER_FILE)).decode(), store_hash)


@dataclass(frozen=True, slots=True)
class Remaining:
    """Makes the dataset of what is still to read; Ray calls it whenever a worker group starts."""

    run: RunConfig
    manifest: Manifest
    neighbors: SideManifest | None
    run_uri: str
    store_hash: str

    def __call__(self) -> ray.data.Dataset:
        """The dataset.

        Raises:
            CheckpointError: If the checkpoint that workers will get is torn.
            StorageError: If the run's folder cannot be read.
        """
        return training_dataset(
            self.manifest,
            self.run.data,
            seed=self.run.seed,
            epochs=self.run.training.epochs,
            ledger=committed_ledger(self.run_uri, self.store_hash),
            neighbors=self.neighbors,
        )
