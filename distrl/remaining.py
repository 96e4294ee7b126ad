"""What a run has still to train on, asked anew whenever its workers start."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import ray.data

# Ray Train has no public error by which a dataset's maker asks to be called again.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from distrl.config import RunConfig
from distrl.data.plan import Ledger
from distrl.data.side_tables import SideManifest
from distrl.data.stream import training_dataset
from distrl.errors import CheckpointError, StorageError
from distrl.folder import RunFolder
from distrl.schema import Manifest
from distrl.storage import join, read_bytes
from distrl.train.state import LEDGER_FILE

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train keeps which checkpoint it will hand to the workers."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0


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


@dataclass(slots=True)
class Remaining:
    """Makes the dataset of what is still to read; Ray calls it whenever a worker group starts."""

    run: RunConfig
    manifest: Manifest
    neighbors: SideManifest | None
    run_uri: str
    store_hash: str
    monitor: Any
    """Handle of the run's monitor, which is told of a folder that cannot be read."""
    failures: int = field(default=0, init=False)
    """Times in a row that the run's folder could not be read."""

    def __call__(self) -> ray.data.Dataset:
        """The dataset.

        Raises:
            CheckpointError: If the checkpoint that workers will get is torn.
            StorageError: If the run's folder could not be read `workers.max_failures` times.
            WorkerGroupStartupFailedError: Before that, upon which Ray starts the workers anew.
        """
        try:
            ledger = committed_ledger(self.run_uri, self.store_hash)
        except StorageError as error:
            self._wait(error)
            raise WorkerGroupStartupFailedError(str(error)) from error
        self.failures = 0
        return training_dataset(
            self.manifest,
            self.run.data,
            seed=self.run.seed,
            epochs=self.run.training.epochs,
            ledger=ledger,
            neighbors=self.neighbors,
        )

    def _wait(self, error: StorageError) -> None:
        """Tells the user, and pauses: what is away for a moment is rarely back at once."""
        self.failures += 1
        most = self.run.workers.max_failures
        if 0 <= most < self.failures:
            raise error
        pause_s = min(FIRST_PAUSE_S * 2 ** (self.failures - 1), LONGEST_PAUSE_S)
        self.monitor.tell.remote(
            f"warning: workers cannot start: {error}; trying again in {pause_s:.0f} s"
        )
        time.sleep(pause_s)
