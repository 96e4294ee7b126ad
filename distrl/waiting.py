"""Storage that is away for a while: asked again, later and later."""

import time
from collections.abc import Callable
from typing import TypeVar

from distrl.errors import StorageError

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0
LONGEST_OUTAGE_S = 1800.0
"""How long a place is waited for that may fail a bounded number of times."""


def once_there(
    do: Callable[[], T],
    say: Callable[[str], None],
    *,
    longest_s: float | None = LONGEST_OUTAGE_S,
    line: Callable[[Exception], str] = str,
) -> T:
    """Does what needs storage, again and again while that is away.

    Args:
        do: May be begun anew however far it came.
        say: Takes a line for the user each time.
        longest_s: How long to wait in all; None: as long as it takes.
        line: What an error says, in one line.

    Raises:
        StorageError: What it raised last, if the place is away too long.
    """
    began, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return do()
        except StorageError as error:
            if longest_s is not None and time.monotonic() - began + pause_s > longest_s:
                raise
            say(f"warning: {line(error)}; asking again in {pause_s:.0f} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
