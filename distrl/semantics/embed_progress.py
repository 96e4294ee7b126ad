"""How far a run of embedding is, said every few seconds while its parts are in the making."""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

_EVERY_S = 5.0


@ray.remote(num_cpus=0)
class Counter:
    """Rows that all actors have done so far."""

    def __init__(self) -> None:
        self._made = self._taken_over = 0

    def add(self, made: int, taken_over: int) -> None:
        """Counts rows."""
        self._made += made
        self._taken_over += taken_over

    def counts(self) -> tuple[int, int]:
        """Rows made, and rows of parts that an earlier job had made."""
        return self._made, self._taken_over


class Progress:
    """Says a line every few seconds from a thread of its own, because the driver waits for Ray."""

    def __init__(self, counter: Any, total: int, parts: int, say: Callable[[str], None]) -> None:  # noqa: ANN401
        self._counter, self._total, self._num_parts, self._say = counter, total, parts, say
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        """When rows were first seen to be done, and how many: loading is no part of the rate."""
        self._parts_done = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def part(self) -> None:
        """Counts a part that is written."""
        self._parts_done += 1

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            try:
                made, taken_over = ray.get(self._counter.counts.remote(), timeout=_EVERY_S)
            except RayError:
                continue  # the run itself says what became of Ray
            self._say(self._line(made, taken_over))

    def _line(self, made: int, taken_over: int) -> str:
        elapsed = time.monotonic() - self._start
        line = (
            f"embed  {made + taken_over:>11,} of {self._total:,} rows  {self._parts_done:>5}/"
            f"{self._num_parts} parts  {elapsed:6.1f} s"
        )
        if made == 0:
            return line + ("" if taken_over else "  (loading)")
        if self._first is None:
            self._first = (elapsed, made)
        since, already = self._first
        if made == already:
            return line
        rate = (made - already) / (elapsed - since)
        left_s = max(self._total - made - taken_over, 0) / rate
        return f"{line}  {rate:,.0f}/s  about {left_s:,.0f} s left"
