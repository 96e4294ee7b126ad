"""A study's trials, each with its resolved config, before anything runs."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distrl.config import RunConfig, load_config
from distrl.data.evaluation_config import EvaluationConfig
from distrl.errors import ConfigError
from distrl.schema import Config
from distrl.storage import absolute, join
from distrl.study.config import Choice, Distribution, StudyConfig, Uniform

BASE_VARIANT = "base"
"""Name of the only variant of a study that names none."""


class Trial(Config):
    """One training of a study."""

    name: str
    """Its folder."""
    variant: str
    values: dict[str, Any]
    """Of the keys of the grid or the search."""
    seed: int
    run: RunConfig
    evaluations: dict[str, EvaluationConfig]
    """How it is judged on the test split, by name."""

    @property
    def label(self) -> str:
        """What tells it from the study's other trials, its seed excepted."""
        values = [f"{key.rpartition('.')[2]}={shown(value)}" for key, value in self.values.items()]
        named = [] if self.variant == BASE_VARIANT and values else [self.variant]
        return " ".join([*named, *values])


def trial_folder(study_uri: str, trial: str) -> str:
    """Where a trial's checkpoints are."""
    return join(study_uri, "trials", trial)


def shown(value: Any) -> str:  # noqa: ANN401
    """A value as tables and pictures show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trials(study: StudyConfig) -> list[Trial]:
    """All trials, in the order of variants, values and seeds.

    Raises:
        ConfigError: Naming every key or value that is wrong in any of them.
    """
    found, problems = [], []
    for number, (variant, values) in enumerate(_settings(study)):
        for seed in study.seeds:
            try:
                found.append(_trial(study, f"{number:03d}-seed{seed}", variant, values, seed))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(f"study {study.name}: " + "; ".join(dict.fromkeys(problems)))
    return found


def _settings(study: StudyConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant with each combination of values."""
    combinations = list(_combinations(study))
    for variant in study.variants or {BASE_VARIANT: ()}:
        for values in combinations:
            yield variant, values


def _combinations(study: StudyConfig) -> Iterator[dict[str, Any]]:
    if study.search:
        for number in range(study.num_samples):
            yield {
                key: draw(of, _share(study.name, number, key)) for key, of in study.search.items()
            }
        return
    for values in itertools.product(*study.grid.values()):
        yield dict(zip(study.grid, values, strict=True))


def draw(distribution: Distribution, share: float) -> Any:  # noqa: ANN401
    """The value below which a share of a distribution lies; share is in [0, 1)."""
    if isinstance(distribution, Choice):
        return distribution.choice[int(share * len(distribution.choice))]
    if isinstance(distribution, Uniform):
        low, high = distribution.uniform
        return low + share * (high - low)
    low, high = distribution.loguniform
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _share(*words: object) -> float:
    """A number in [0, 1) that the words fix: the same draw after a restart, on any machine."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def _trial(
    study: StudyConfig, name: str, variant: str, values: Mapping[str, Any], seed: int
) -> Trial:
    overrides = [
        *study.overrides,
        *study.variants.get(variant, ()),
        *(f"{key}={json.dumps(value)}" for key, value in values.items()),
        f"seed={seed}",
        f"name={name}",
        "workers.num_workers=1",
    ]
    if study.epochs is not None:
        overrides.append(f"training.epochs={study.epochs}")
    if study.patience is not None:
        overrides.append(f"training.patience={study.patience}")
    base = Path(study.base)
    run = load_config(RunConfig, base, overrides)
    data = run.data.model_copy(update={"store_uri": absolute(run.data.store_uri)})
    evaluations = {
        name: load_config(RunConfig, base, [*overrides, *more]).evaluation
        for name, more in study.evaluations.items()
    }
    return Trial(
        name=name,
        variant=variant,
        values=dict(values),
        seed=seed,
        run=run.model_copy(update={"data": data}),
        evaluations=evaluations,
    )
