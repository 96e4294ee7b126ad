"""What every run that lost a worker must still be: each row once, one MLflow run."""

import json
import sqlite3
from pathlib import Path

from distrl.data.plan import Ledger
from distrl.data.store import manifest_hash
from distrl.schema import Manifest


def last_checkpoint(run_folder: Path) -> Path:
    """The checkpoint that Ray Train would go on from."""
    snapshot = json.loads((run_folder / "checkpoint_manager_snapshot.json").read_text())
    return run_folder / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]


def assert_each_row_once(run_folder: Path, manifest: Manifest, epochs: int) -> None:
    """By the ledger of its last checkpoint."""
    text = (last_checkpoint(run_folder) / "ledger.json").read_text()
    ledger = Ledger.from_json(text, manifest_hash(manifest))
    for epoch in range(epochs):
        for number, shard in enumerate(manifest.sequences):
            assert ledger.consumed_count(epoch, number) == shard.trainable_rows


def only_run(database: Path) -> dict[str, list[int]]:
    """Steps of each metric of the one run that an MLflow file holds, which has finished."""
    with sqlite3.connect(database) as connection:
        runs = connection.execute("select run_uuid, status from runs").fetchall()
        ((_, status),) = runs
        rows = connection.execute("select key, step from metrics order by step").fetchall()
    assert status == "FINISHED"
    found: dict[str, list[int]] = {}
    for key, step in rows:
        found.setdefault(key, []).append(step)
    return found
