"""Tasks run on Ray a bounded number at a time, with progress and errors that say what is wrong."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import ray
from ray import ObjectRef
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayTaskError

from distrl.errors import ConfigError, DistrlError, StorageError

_QUIET_S = 3.0
"""Seconds between progress lines, at least."""

# Ray's stubs do not know that a task with several returns gives as many references.
Launch = Callable[[], Any]


class Stage:
    """Progress of one step: a line now and then, and one at its end."""

    def __init__(self, name: str, total: int, say: Callable[[str], None]) -> None:
        self._name, self._total, self._say = name, total, say
        self._start = self._last = time.monotonic()
        self._done = self._rows = 0

    def advance(self, tasks: int, rows: int) -> None:
        """Counts finished tasks and rows."""
        self._done += tasks
        self._rows += rows
        self.tick()

    def tick(self) -> None:
        """Says how far it is, if the last word was long enough ago."""
        if time.monotonic() - self._last >= _QUIET_S:
            self._last = time.monotonic()
            self._say(self._line())

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._say(self._line())

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = f", {self._rows / elapsed:,.0f}/s" if elapsed > 0 and self._rows else ""
        left = ""
        if 0 < self._done < self._total:
            left = f", about {elapsed / self._done * (self._total - self._done):,.0f} s left"
        return (
            f"{self._name:<24} {self._done:>5}/{self._total} tasks  {self._rows:>13,} rows"
            f"  {elapsed:6.1f} s{rate}{left}"
        )


def fetch(reference: ObjectRef) -> Any:  # noqa: ANN401
    """What a task made, or the task's own error without Ray's wrapping.

    Raises:
        DistrlError: As the task raised it.
        ConfigError: If the task ran out of memory.
        StorageError: If a node ran out of disk to spill to.
    """
    try:
        return ray.get(reference)
    except (OutOfDiskError, ObjectStoreFullError) as error:
        raise StorageError(f"a node has no room left to spill to: {error}") from error
    except OutOfMemoryError as error:
        raise ConfigError(
            "a task ran out of memory: give each less (a lower partition_mb or more "
            "num_partitions; in jobs/retrieve.py queries_per_task and block_mb), or lower "
            f"num_cpus: {error}"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, DistrlError):
            raise error.cause from None
        raise


def run_tasks(
    launches: Iterable[Launch], limit: int, stage: Stage, rows_of: Callable[[Any], int]
) -> list[tuple[Any, list[ObjectRef]]]:
    """Starts tasks, `limit` at a time, and waits for all; summaries and results in their order.

    Args:
        launches: Each starts a task that returns a summary and results.
        limit: Most tasks at a time.
        stage: Told of every finished task.
        rows_of: Rows to report, from a summary.
    """
    waiting = list(enumerate(launches))[::-1]
    running: dict[ObjectRef, tuple[int, list[ObjectRef]]] = {}
    finished: dict[int, tuple[Any, list[ObjectRef]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                index, launch = waiting.pop()
                summary, *results = launch()
                running[summary] = (index, list(results))
            ready, _ = ray.wait(list(running), timeout=_QUIET_S)
            for summary in ready:
                index, results = running.pop(summary)
                finished[index] = (fetch(summary), results)
                stage.advance(1, rows_of(finished[index][0]))
            stage.tick()
    except BaseException:
        for summary in running:
            ray.cancel(summary, force=False)
        raise
    return [finished[index] for index in sorted(finished)]


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of a job that are all of one size."""

    num_cpus: float
    """Of each."""
    limit: int
    """Most at a time."""
    say: Callable[[str], None]
    """Told of progress, a line at a time."""

    def of(self, task: Any, *given: object) -> Launch:  # noqa: ANN401
        """Starts a task when called."""
        return partial(task.options(num_cpus=self.num_cpus).remote, *given)

    def run(
        self, name: str, launches: Sequence[Launch], rows_of: Callable[[Any], int]
    ) -> list[tuple[Any, list[ObjectRef]]]:
        """A stage of that name; as `run_tasks`."""
        with Stage(name, len(launches), self.say) as stage:
            return run_tasks(launches, self.limit, stage, rows_of)


def run_generators(
    launches: Iterable[Launch],
    limit: int,
    stage: Stage,
    rows_of: Callable[[Any], int],
) -> list[tuple[Any, list[ObjectRef]]]:
    """As `run_tasks`, for tasks that yield any number of results and their summary last."""
    waiting = list(enumerate(launches))[::-1]
    running: dict[ray.ObjectRefGenerator, tuple[int, list[ObjectRef]]] = {}
    finished: dict[int, tuple[Any, list[ObjectRef]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                index, launch = waiting.pop()
                running[launch()] = (index, [])
            ready, _ = ray.wait(list(running), timeout=_QUIET_S, fetch_local=False)
            for generator in cast("list[ray.ObjectRefGenerator]", ready):
                result = next(generator, None)
                if result is not None:
                    running[generator][1].append(result)
                    continue
                index, results = running.pop(generator)
                finished[index] = (fetch(results[-1]), results[:-1])
                stage.advance(1, rows_of(finished[index][0]))
            stage.tick()
    except BaseException:
        for generator in running:
            ray.cancel(generator, force=False)
        raise
    return [finished[index] for index in sorted(finished)]
