"""What is known of a run while it runs: its progress, its validations, its MLflow run.

One object holds it, in one process on the driver's node, so that one process alone talks to MLflow
and a restart of the workers loses nothing. Plain Python: the launcher makes an actor of it.
"""

import json
import logging
import time
from collections.abc import Mapping

from distrl.storage import exists, read_bytes, write_bytes
from distrl.tracking.run_log import RunLog

SELECT_BY = "val/ndcg_at_10"
"""The validation metric that chooses the best checkpoint, seen items kept."""


class Monitor:
    """Progress, validations and the MLflow log of one run."""

    def __init__(
        self, tracking_uri: str, run_id: str, validations_uri: str, patience: int | None
    ) -> None:
        self._log = RunLog(tracking_uri, run_id)
        self._validations_uri = validations_uri
        self._patience = patience
        self._known: dict[int, dict[str, float]] | None = None
        """Of validations, by step; None until the file was read, which here could end the actor."""
        self._progress: dict[str, float] = {}
        self._messages: list[str] = []
        logging.getLogger("distrl").addHandler(_Keep(self._messages))

    @property
    def _validations(self) -> dict[int, dict[str, float]]:
        """Those of this process and of the ones before it."""
        if self._known is None:
            stored = {}
            if exists(self._validations_uri):
                stored = json.loads(read_bytes(self._validations_uri))
            self._known = {int(step): metrics for step, metrics in stored.items()}
        return self._known

    def report(self, progress: Mapping[str, float], curves: Mapping[str, float]) -> None:
        """Progress of all workers, which has a `step`, and means of the loss terms since then."""
        self._progress = {**progress, "at": time.time()}
        if curves:
            self._log.log_metrics(int(progress["step"]), curves)

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Points of further curves."""
        self._log.log_metrics(step, metrics)

    def validated(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Metrics of a checkpoint on the validation split; a repetition changes nothing."""
        if step in self._validations:
            return
        known = {**self._validations, step: {**metrics, "epoch": epoch}}
        # What cannot be written is not known either: who tells of it tells again.
        write_bytes(self._validations_uri, json.dumps(known, indent=1).encode())
        self._known = known
        self._log.log_metrics(step, metrics)
        best = max(entry[SELECT_BY] for entry in self._validations.values())
        self._messages.append(
            f"validated epoch {epoch:.0f} (step {step}): NDCG@10 {metrics[SELECT_BY]:.4f}"
            + (" (best)" if metrics[SELECT_BY] == best else f" (best {best:.4f})")
        )

    def wrote(self, name: str, text: str) -> None:
        """A text for people, kept with the run."""
        self._log.log_text(name, text)

    def tell(self, message: str) -> None:
        """Something that the user should read."""
        self._messages.append(message)

    def should_stop(self) -> bool:
        """Whether the last `patience` validations were all no better than one before them."""
        if self._patience is None or not self._validations:
            return False
        scores = [self._validations[step][SELECT_BY] for step in sorted(self._validations)]
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        return len(scores) - 1 - best >= self._patience

    def validations(self) -> dict[int, dict[str, float]]:
        """Validation metrics by global step."""
        return dict(sorted(self._validations.items()))

    def speed(self) -> dict[str, float]:
        """Seconds an epoch, targets/s and share of time waiting for data, since the last start."""
        last = self._progress
        if not last.get("epochs_done"):
            return {}
        return {
            "epoch_s": last["elapsed_s"] / last["epochs_done"],
            "targets_per_s": last["all_targets"] / last["elapsed_s"],
            "wait_share": last["waited_s"] / last["elapsed_s"],
        }

    def news(self) -> tuple[dict[str, float], list[str]]:
        """The latest progress, and the messages since the last call."""
        # One by one, as the log's thread may add to them meanwhile.
        messages = [self._messages.pop(0) for _ in range(len(self._messages))]
        return self._progress, messages

    def close(self, timeout_s: float) -> list[tuple[int, dict[str, float]]]:
        """Delivers what MLflow has not got yet, and returns what could not be delivered."""
        return self._log.close(timeout_s)


class _Keep(logging.Handler):
    """Keeps warnings for the driver to print: an actor's own output is nobody's to read."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(f"{record.levelname.lower()}: {record.getMessage()}")
