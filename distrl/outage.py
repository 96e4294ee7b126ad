"""What ends Ray Train's controller though no worker failed, and is gone on from all the same."""

import builtins
import time
from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)
from ray.train import ControllerError, TrainingFailedError

from distrl.errors import DistrlError, StorageError
from distrl.storage import check_writable
from distrl.waiting import FIRST_PAUSE_S, LONGEST_OUTAGE_S, LONGEST_PAUSE_S, once_there

T = TypeVar("T")

SHORT_S = 300.0
"""An attempt that ends sooner has come nowhere: the pause before the next one grows."""

_LOST_TASK = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)


def through_outages(
    train: Callable[[], T], place: str, max_failures: int, say: Callable[[str], None]
) -> T:
    """Trains; where storage failed Ray Train's own bookkeeping, waits for it and trains on.

    Ray starts workers again that fail, but ends a run whose list of checkpoints it cannot read or
    write, and one whose task that ranks a checkpoint was killed with its process. What it has
    written is what the next attempt goes on from.

    Args:
        train: One attempt, from the last checkpoint to the end.
        place: The run's folder.
        max_failures: Of these failures in all; -1: without end, and each as long as it takes.
        say: Takes lines for the user.

    Raises:
        TrainingFailedError: What ended the last attempt otherwise.
        StorageError: If the place is away too long, or fails once too often.
        DistrlError: If the task that ranks dies once too often.
    """
    failures, pause_s = 0, FIRST_PAUSE_S
    while True:
        began = time.monotonic()
        try:
            return train()
        except (TrainingFailedError, ActorDiedError) as error:
            problem = _problem(error, place)
            if problem is None:
                raise
            failures += 1
            if 0 <= max_failures < failures:
                raise type(problem)(
                    f"training stopped {failures} times, at last as {problem}"
                ) from error
        say(f"warning: training stopped, as {problem}; it goes on from the last checkpoint")
        if time.monotonic() - began >= SHORT_S:
            pause_s = FIRST_PAUSE_S
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        longest_s = None if max_failures < 0 else LONGEST_OUTAGE_S
        once_there(lambda: check_writable(place), say, longest_s=longest_s)


def _problem(error: TrainingFailedError | ActorDiedError, place: str) -> DistrlError | None:
    """What is told of a failure that another attempt may get over; None of any other."""
    if isinstance(error, ActorDiedError):
        said = (str(error).strip().splitlines() or [""])[-1]
        return StorageError(f"{place} failed it: {said}") if _names_storage(error, said) else None
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    if isinstance(failure, _LOST_TASK):
        return DistrlError(
            f"the process that ranks checkpoints died: {_first_line(failure)} If memory ran out, "
            "lower evaluation.batch_size"
        )
    if isinstance(failure, OSError | StorageError) and not isinstance(failure, RayError):
        return StorageError(f"{place} failed it: {_first_line(failure)}")
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _names_storage(error: ActorDiedError, said: str) -> bool:
    """Whether the controller could not begin for want of storage; of its error a text is left."""
    name = said.partition(":")[0].rpartition(".")[2]
    known = getattr(builtins, name, None)
    is_os = isinstance(known, type) and issubclass(known, OSError)
    return error.actor_init_failed and (is_os or name == StorageError.__name__)
