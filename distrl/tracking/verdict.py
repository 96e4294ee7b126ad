"""Whether a version may become the champion: pure arithmetic on metrics.

Gains and losses are relative to the champion's value, so one gate serves data sets whose metrics
differ by an order of magnitude: a minimum gain of 0.01 asks for 1 % more than the champion has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeFloat, model_validator

from distrl.errors import ConfigError
from distrl.schema import Config

SLACK = 1e-12
"""So that the rounding of a bound decides nothing; metrics are of the order 0.01 to 1."""


class Gate(Config):
    """What a version must show, by metric, such as ndcg_at_10."""

    min_gain: dict[str, float] = Field(default_factory=lambda: {"ndcg_at_10": 0.0})
    """At least champion * (1 + gain); 0.0 means no worse than the champion."""
    max_loss: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """At least champion * (1 - loss): what a gain elsewhere may cost here."""
    floors: dict[str, float] = Field(default_factory=dict)
    """At least this, with or without a champion: all there is to judge the first version by."""

    @model_validator(mode="after")
    def _compares(self) -> "Gate":
        if not self.min_gain and not self.max_loss:
            raise ValueError(
                "min_gain and max_loss are both empty, so any version would win; give at least "
                "one metric, such as min_gain={ndcg_at_10: 0.0}"
            )
        return self

    @property
    def metrics(self) -> set[str]:
        """Every metric that decides."""
        return {*self.min_gain, *self.max_loss, *self.floors}


@dataclass(frozen=True, slots=True)
class Check:
    """One metric against one bound."""

    rule: Literal["min_gain", "max_loss", "floors"]
    metric: str
    limit: float
    """As configured."""
    bound: float
    """The least value that passes."""
    value: float
    """The candidate's."""

    @property
    def passed(self) -> bool:
        """Whether the candidate keeps the bound; a value that is no number does not."""
        return self.value >= self.bound - SLACK

    def __str__(self) -> str:
        verb = "is" if self.passed else "should be"
        return (
            f"{self.metric} {self.value:.5f} {verb} at least {self.bound:.5f} "
            f"({self.rule}.{self.metric}={self.limit:g})"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a comparison, and why."""

    checks: tuple[Check, ...]
    has_champion: bool

    @property
    def promoted(self) -> bool:
        """Whether every check passed; without a champion and floors there is none to fail."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The checks that failed, or that all passed."""
        failed = [str(check) for check in self.checks if not check.passed]
        if failed:
            return "; ".join(failed)
        passed = "; ".join(str(check) for check in self.checks)
        if self.has_champion:
            return passed
        return "the first champion: " + (passed or "no floors are set, so there is no condition")


def judge(
    candidate: Mapping[str, float], champion: Mapping[str, float] | None, gate: Gate
) -> Verdict:
    """Compares a version with the champion.

    Args:
        candidate: Its metrics by name.
        champion: The champion's, of the same store and split; None where there is none, and then
            the floors alone decide.
        gate: What must hold.

    Raises:
        ConfigError: If the gate names a metric that was not measured.
    """
    unknown = sorted(gate.metrics - candidate.keys())
    if unknown:
        raise ConfigError(
            f"the gate names {', '.join(unknown)}; measured are {', '.join(sorted(candidate))}"
        )
    checks = [
        Check("floors", metric, floor, floor, candidate[metric])
        for metric, floor in gate.floors.items()
    ]
    if champion is not None:
        checks += [
            Check("min_gain", metric, gain, champion[metric] * (1 + gain), candidate[metric])
            for metric, gain in gate.min_gain.items()
        ]
        checks += [
            Check("max_loss", metric, loss, champion[metric] * (1 - loss), candidate[metric])
            for metric, loss in gate.max_loss.items()
        ]
    return Verdict(tuple(checks), champion is not None)
