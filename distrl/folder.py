"""A run's folder on storage: what it was started with, and whether it is finished."""

import json
from typing import Any

from distrl.config import RunConfig
from distrl.errors import CheckpointError, ConfigError
from distrl.storage import exists, join, read_bytes, write_bytes
from distrl.tracking import runs
from distrl.tracking.config import artifact_location
from distrl.tracking.run_log import RunLog

START_FILE = "run.json"
RESULT_FILE = "result.json"
CHANGEABLE = (
    "commit", "workers", "tracking", "training", "evaluation.num_workers",
    "evaluation.cpus_per_worker", "evaluation.gpus_per_worker", "evaluation.batch_size",
    "evaluation.item_chunk", "evaluation.cutoffs", "evaluation.length_bounds", "data.read_tasks",
    "data.read_cpus", "data.read_ahead_bytes", "data.prefetch_batches", "data.verify_checksums",
)  # fmt: skip
"""What may differ when a run is resumed, sections and keys: how, not what, is trained."""


class RunFolder:
    """The folder `<storage_uri>/<name>` of one run, local or not."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def at(self, name: str) -> str:
        """URI of a file of the run."""
        return join(self.uri, name)

    def has(self, name: str) -> bool:
        """Whether the run has this file."""
        return exists(self.at(name))

    def read(self, name: str) -> str:
        """Text of a file of the run."""
        return read_bytes(self.at(name)).decode()

    def write(self, name: str, text: str) -> None:
        """Writes a file of the run whole."""
        write_bytes(self.at(name), text.encode())

    def is_finished(self) -> bool:
        """Whether the run ended well."""
        return self.has(RESULT_FILE)

    def check_name(self, *, resume: bool) -> None:
        """Refuses a used name, and a resumption of nothing.

        Raises:
            ConfigError: Saying what to do instead.
        """
        name = self.uri.rsplit("/", 1)[-1]
        if exists(self.uri) and not resume:
            raise ConfigError(
                f"name={name}: {self.uri} exists; choose another name, or give --resume to go on "
                "with it"
            )
        if resume and not self.has(START_FILE):
            raise ConfigError(f"name={name}: there is no run to resume in {self.uri}")

    def open(
        self, run: RunConfig, made_of: dict[str, str], tracking_uri: str, *, resume: bool
    ) -> str:
        """Starts or reopens the run, and returns the id of its one MLflow run.

        Args:
            run: The resolved config.
            made_of: Hashes of the store and of the tables beside it, by what they are.
            tracking_uri: Of the MLflow server.
            resume: Whether it was started before.

        Raises:
            ConfigError: If the resumed run trained something else.
            CheckpointError: If the store, or a table, is no longer the one that it began with.
            TrackingError: If MLflow refuses.
        """
        settings = run.model_dump(mode="json")
        if resume:
            started = json.loads(self.read(START_FILE))
            self._check_same(started, settings, made_of)
            runs.resume_run(tracking_uri, started["run_id"])
            return started["run_id"]
        run_id = runs.create_run(
            tracking_uri,
            run.tracking.experiment,
            run.name,
            {**made_of, **runs.environment_tags(), **_commit(run)},
            artifacts=artifact_location(run.tracking, tracking_uri),
        )
        log = RunLog(tracking_uri, run_id)
        log.log_params(runs.flat_params(run))
        log.log_dict("config.json", settings)
        log.close(30.0)
        start = {"run_id": run_id, **made_of, "config": settings}
        self.write(START_FILE, json.dumps(start, indent=1))
        return run_id

    def _check_same(
        self, started: dict[str, Any], settings: dict[str, Any], made_of: dict[str, str]
    ) -> None:
        for what, now in made_of.items():
            before = started.get(what, now)
            if before != now:
                raise CheckpointError(
                    f"{self.uri} began with {what}={before[:12]}, which is now {now[:12]}: resume "
                    "with what it began with"
                )
        before = {k: v for k, v in _flat(started["config"]) if not _is_changeable(k)}
        now = {k: v for k, v in _flat(settings) if not _is_changeable(k)}
        differ = [
            f"{key}={now.get(key)!r} (was {before.get(key)!r})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differ:
            raise ConfigError(
                f"{self.uri} cannot be resumed with another config: {', '.join(differ)}"
            )


def _is_changeable(key: str) -> bool:
    return key in CHANGEABLE or key.split(".")[0] in CHANGEABLE


def _commit(run: RunConfig) -> dict[str, str]:
    return {"mlflow.source.git.commit": run.commit} if run.commit else {}


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in settings.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs
