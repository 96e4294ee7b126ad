"""A run seen from its driver: progress and failures as lines for the user."""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError

from distrl.config import TrainingConfig
from distrl.train.causes import in_a_line

Say = Callable[[str], None]

SILENCE_S = 20.0
"""How long nothing may be trained at first before the user is told that workers are waited for."""

LATER_SILENCE_S = 60.0
"""The same once steps were taken, or three times the longest time between two reports so far."""

REPEATS_S = 10.0
"""Within which the same failure of the same worker is the one that was told of."""


class TellFailures(ray.train.UserCallback):
    """Tells the user why the workers are started again; Ray itself only logs it."""

    def __init__(self, monitor: Any) -> None:  # noqa: ANN401
        self._monitor = monitor
        self._told: dict[tuple[int, str], float] = {}

    def after_exception(
        self,
        run_context: Any,  # noqa: ANN401
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """One line for each worker that failed."""
        for rank, error in worker_exceptions.items():
            # Until a node that was called back is gone, Ray tells of its workers every 2 s.
            before = self._told.get((rank, str(error)), -REPEATS_S)
            self._told[rank, str(error)] = time.monotonic()
            if time.monotonic() - before < REPEATS_S:
                continue
            self._monitor.tell.remote(
                f"warning: worker {rank} failed: {in_a_line(error)}; unless it was one failure too "
                "many (workers.max_failures), all go on from the last checkpoint"
            )


class Watch:
    """Prints a run's progress and messages from the driver while Ray Train holds its thread."""

    def __init__(self, monitor: Any, training: TrainingConfig, say: Say) -> None:  # noqa: ANN401
        self._monitor, self._training, self._say = monitor, training, say
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._last = -1.0
        self._asked: Any = None
        """What the monitor has not answered yet; asked twice, one answer would be lost."""
        self._began = self._heard = self._told = time.monotonic()
        self._longest_s = 0.0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._tell()

    def _watch(self) -> None:
        while not self._done.wait(self._training.progress_every_s):
            self._tell()

    def _tell(self) -> None:
        progress, messages = self._news()
        for message in messages:
            self._say(message)
        if progress and progress["step"] != self._last:
            # A wait that had to be told of is no measure of how long reports usually take.
            if self._last >= 0 and self._told <= self._heard:
                self._longest_s = max(self._longest_s, time.monotonic() - self._heard)
            self._last, self._heard = progress["step"], time.monotonic()
            self._say(progress_line(progress, self._training.epochs))
        else:
            self._tell_of_waiting()

    def _news(self) -> tuple[dict[str, float], list[str]]:
        """What the monitor says, or nothing yet."""
        try:
            self._asked = self._asked or self._monitor.news.remote()
            done, _ = ray.wait([self._asked], timeout=10)
            if not done:
                return {}, []
            answer, self._asked = self._asked, None
            return ray.get(answer)
        except RayError:
            self._asked = None
            return {}, []

    def _tell_of_waiting(self) -> None:
        now, started = time.monotonic(), self._last >= 0
        patience_s = max(LATER_SILENCE_S, 3 * self._longest_s) if started else SILENCE_S
        if now - max(self._told, self._heard) < patience_s or self._done.is_set():
            return
        self._told = now
        there, free = ray.cluster_resources(), ray.available_resources()
        share = " and ".join(
            f"{free.get(name, 0.0):g} of {there[name]:g} {name}"
            for name in ("CPU", "GPU")
            if name in there
        )
        since = now - (self._heard if started else self._began)
        what = (
            f"no news after step {self._last:.0f}: a checkpoint is ranked, or workers"
            if started
            else "no report yet: workers start, take their first steps, or"
        )
        self._say(f"{since:.0f} s and {what} wait for the cluster to hold them ({share} free)")


def progress_line(progress: dict[str, float], epochs: int) -> str:
    """How far, how fast, the loss, the share of time waited for data, and how long yet."""
    minutes, seconds = divmod(round(progress["eta_s"]), 60)
    return (
        f"epoch {progress['epoch']:.2f}/{epochs}  step {progress['step']:.0f}  "
        f"loss {progress.get('loss', float('nan')):.4f}  {progress['rows_per_s']:,.0f} rows/s  "
        f"{progress['targets_per_s']:,.0f} targets/s  "
        f"waiting for data {100 * progress['wait_share']:.1f}%  ETA {minutes}m{seconds:02d}s"
    )
