"""A run's storage that is away while Ray Train writes to it: waited for, and gone on with."""

import time
from collections.abc import Callable
from typing import TypeVar

from ray.train import ControllerError, TrainingFailedError

from distrl.errors import StorageError
from distrl.storage import check_writable

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0
LONGEST_OUTAGE_S = 1800.0
"""How long a place is waited for that may fail a bounded number of times."""


def through_outages(
    train: Callable[[], T], storage_uri: str, max_failures: int, say: Callable[[str], None]
) -> T:
    """Trains; where storage failed Ray Train's own bookkeeping, waits for it and trains on.

    Ray starts workers again that fail, but ends a run whose list of checkpoints it cannot read or
    write. What it has written is what the next attempt goes on from.

    Args:
        train: One attempt, from the last checkpoint to the end.
        storage_uri: Where the run is kept.
        max_failures: Outages in all; -1: without end, and each as long as it takes.
        say: Takes lines for the user.

    Raises:
        TrainingFailedError: What ended the last attempt.
        StorageError: If the place is away too long.
    """
    failures = 0
    while True:
        try:
            return train()
        except TrainingFailedError as error:
            problem = _of_storage(error)
            if problem is None or 0 <= max_failures <= failures:
                raise
        failures += 1
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        say(
            f"warning: training stopped, as {storage_uri} failed it: {first}; it goes on from the "
            "last checkpoint once that can be written again"
        )
        _wait_for(storage_uri, None if max_failures < 0 else LONGEST_OUTAGE_S, say)


def _of_storage(error: TrainingFailedError) -> Exception | None:
    if not isinstance(error, ControllerError):
        return None
    failure = error.controller_failure
    return failure if isinstance(failure, OSError | StorageError) else None


def _wait_for(uri: str, longest_s: float | None, say: Callable[[str], None]) -> None:
    began, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            check_writable(uri)
            return
        except StorageError as error:
            if longest_s is not None and time.monotonic() - began + pause_s > longest_s:
                raise
            say(f"warning: {error}; asking again in {pause_s:.0f} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
