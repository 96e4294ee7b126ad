"""Times of alternatives, taken in turns so that a busy moment hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds that one run of an alternative took, over several runs."""

    median_s: float
    least_s: float
    most_s: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Of the runs' seconds."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    @property
    def spread(self) -> str:
        """Least and most as a share of the median."""
        return f"{self.least_s / self.median_s - 1:+.0%} {self.most_s / self.median_s - 1:+.0%}"


def interleaved(alternatives: Mapping[str, Callable[[], object]], runs: int) -> dict[str, Timing]:
    """Runs each alternative once to warm up, then all of them in turns.

    Args:
        alternatives: By name; what they return is dropped.
        runs: Counted runs of each.
    """
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(runs):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(found) for name, found in seconds.items()}
