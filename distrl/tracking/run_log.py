"""What a run tells MLflow while it trains. Training never waits for MLflow and never fails by it.

Everything goes through one queue and one thread. While MLflow is lost the queue grows, by some 200
bytes a metric point, and the thread tries again, ever more rarely; what is still in the queue at
the end is handed back.
"""

import io
import json
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from distrl.tracking.config import masked
from distrl.tracking.connection import client, patience, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 5000
METRICS_AT_ONCE = 500
SETTINGS_AT_ONCE = 100

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
LAST_RETRY_S = 0.5
"""Between tries once the run is over and someone waits for the rest."""
REQUEST_S = 10

REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")
"""Error codes that no retry will mend."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    content: bytes


_Entry = Metric | Param | RunTag | _File


class RunLog:
    """The log of one MLflow run; usable from any thread of one process."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._lost = False
        self._logged: dict[str, set[int]] | None = None
        """Steps that MLflow has, by metric; None until it has been asked."""
        self._thread = threading.Thread(target=self._deliver_all, name="run-log", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Points of the curves at a global step.

        A step that a metric already has, from before a restart say, keeps its first value.
        """
        now = int(time.time() * 1000)
        # The time is set here, so that a point sent twice is the same row in MLflow.
        self._put([Metric(key, float(value), now, int(step)) for key, value in metrics.items()])

    def log_params(self, params: Mapping[str, str]) -> None:
        """Settings of the run; values are cut to what MLflow takes. They cannot change later."""
        self._put([Param(key, _cut(value, MAX_PARAM_CHARS)) for key, value in params.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; values are cut to what MLflow takes."""
        self._put([RunTag(key, _cut(value, MAX_TAG_CHARS)) for key, value in tags.items()])

    def log_text(self, name: str, text: str) -> None:
        """A text file among the run's artifacts."""
        self.log_bytes(name, text.encode())

    def log_bytes(self, name: str, content: bytes) -> None:
        """A file of any kind among the run's artifacts."""
        self._put([_File(name, content)])

    def log_dict(self, name: str, content: Mapping[str, Any]) -> None:
        """A JSON file among the run's artifacts."""
        self.log_text(name, json.dumps(content, indent=1))

    def log_figure(self, name: str, figure: "Figure") -> None:
        """A picture among the run's artifacts, drawn now, in the format that the name ends in."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(name).suffix.removeprefix("."), dpi=120)
        self._put([_File(name, buffer.getvalue())])

    def close(self, timeout_s: float) -> list[tuple[int, dict[str, float]]]:
        """Waits until MLflow has everything, or for `timeout_s` seconds.

        Returns:
            The metrics that MLflow has not got, by step. Other things that it has not got are
            named in a warning.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = list(self._queue)
        others = [_name(entry) for entry in left if not isinstance(entry, Metric)]
        if others:
            log.warning("MLflow at %s never got %s", masked(self._uri), ", ".join(others))
        steps: dict[int, dict[str, float]] = {}
        for entry in left:
            if isinstance(entry, Metric):
                steps.setdefault(entry.step, {})[entry.key] = entry.value
        return list(steps.items())

    def _put(self, entries: Sequence[_Entry]) -> None:
        with self._changed:
            self._queue.extend(entries)
            self._changed.notify_all()

    def _deliver_all(self) -> None:
        """The thread: sends from the head of the queue until closed and empty."""
        wait_s = FIRST_RETRY_S
        while batch := self._next_batch():
            try:
                with patience(retries=0, request_s=REQUEST_S):
                    self._send(client(self._uri), batch)
            except Exception as error:  # whatever MLflow dies of, training goes on
                self._warn_once(error)
                self._pause(wait_s)
                wait_s = min(2 * wait_s, LONGEST_RETRY_S)
                continue
            with self._changed:
                for _ in batch:
                    self._queue.popleft()
            wait_s, self._lost = FIRST_RETRY_S, False

    def _next_batch(self) -> list[_Entry]:
        """Entries of one kind from the head of the queue; empty when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return []
            kind = type(self._queue[0])
            limit = {Metric: METRICS_AT_ONCE, _File: 1}.get(kind, SETTINGS_AT_ONCE)
            alike = takewhile(lambda entry: isinstance(entry, kind), self._queue)
            return list(islice(alike, limit))

    def _warn_once(self, error: Exception) -> None:
        if not self._lost:
            log.warning(
                "MLflow at %s is lost, training goes on and delivers its metrics later: %s",
                masked(self._uri),
                reason(error, self._uri),
            )
        self._lost = True

    def _pause(self, wait_s: float) -> None:
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, wait_s)
                return
        time.sleep(LAST_RETRY_S)

    def _send(self, mlflow: MlflowClient, batch: Sequence[_Entry]) -> None:
        """Sends entries of one kind. What MLflow refuses is named in a warning and left out."""
        batch = self._without_logged(mlflow, batch)
        if not batch:
            return
        try:
            self._send_as_one(mlflow, batch)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            if len(batch) > 1:
                # One bad name fails a whole batch, so halve until it stands alone.
                self._send(mlflow, batch[: len(batch) // 2])
                self._send(mlflow, batch[len(batch) // 2 :])
                return
            log.warning("MLflow refuses %s: %s", _name(batch[0]), reason(error, self._uri))
        self._remember(batch)

    def _send_as_one(self, mlflow: MlflowClient, batch: Sequence[_Entry]) -> None:
        for entry in batch:
            if isinstance(entry, _File):
                _upload(mlflow, self._run_id, entry)
        metrics = [entry for entry in batch if isinstance(entry, Metric)]
        params = [entry for entry in batch if isinstance(entry, Param)]
        tags = [entry for entry in batch if isinstance(entry, RunTag)]
        if metrics or params or tags:
            mlflow.log_batch(self._run_id, metrics, params, tags, synchronous=True)

    def _without_logged(self, mlflow: MlflowClient, batch: Sequence[_Entry]) -> Sequence[_Entry]:
        """The batch without points that MLflow has, from this process or from one before it."""
        if not isinstance(batch[0], Metric):
            return batch
        if self._logged is None:
            self._logged = {
                key: {point.step for point in mlflow.get_metric_history(self._run_id, key)}
                for key in mlflow.get_run(self._run_id).data.metrics
            }
        fresh = {
            (entry.key, entry.step): entry
            for entry in reversed(batch)
            if isinstance(entry, Metric) and entry.step not in self._logged.get(entry.key, ())
        }
        return list(reversed(fresh.values()))

    def _remember(self, batch: Sequence[_Entry]) -> None:
        for entry in batch:
            if isinstance(entry, Metric) and self._logged is not None:
                self._logged.setdefault(entry.key, set()).add(entry.step)


def _upload(mlflow: MlflowClient, run_id: str, file: _File) -> None:
    folder, _, name = file.name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, name)
        path.write_bytes(file.content)
        mlflow.log_artifact(run_id, str(path), folder or None)


def _cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 3] + "..."


def _name(entry: _Entry) -> str:
    if isinstance(entry, _File):
        return f"file {entry.name}"
    return f"{type(entry).__name__.lower().removeprefix('run')} {entry.key!r}"
