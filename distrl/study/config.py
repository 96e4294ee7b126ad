"""What a study tries, how often, and how its trials are judged."""

from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from distrl.schema import Config
from distrl.tracking.config import TrackingConfig


class Uniform(Config):
    """Any value between two, each as likely."""

    uniform: tuple[float, float]


class LogUniform(Config):
    """Any value between two, each order of magnitude as likely."""

    loguniform: tuple[PositiveFloat, PositiveFloat]


class Choice(Config):
    """One of some values."""

    choice: Annotated[tuple[Any, ...], MinLen(1)]


Distribution = Uniform | LogUniform | Choice


class Halving(Config):
    """Asynchronous successive halving: ASHA, arXiv 1810.05934.

    At epochs grace_epochs, grace_epochs * factor, ... only the best 1 / factor of the trials that
    got there go on, by the metric that chooses the best checkpoint, on the validation split.
    """

    grace_epochs: PositiveInt = 3
    """Epochs that every trial trains."""
    factor: Annotated[int, Field(ge=2)] = 3


class StudyConfig(Config):
    """A study: variants times a grid, or times samples of a search, times seeds.

    Every key of `grid` and `search` is a `section.key` of a run's config, every override a
    `section.key=value`; all trials start from the run that `base` describes.
    """

    name: str
    """The study's folder under `storage_uri`, and its experiment in MLflow. Used once."""
    base: str
    """YAML file of a run. Its `name`, `storage_uri`, `registered_model` and `tracking`, and of its
    `workers` all but the threads, play no part: a trial is one process."""
    storage_uri: str = "studies"
    """Where studies are kept: a local folder or s3://bucket/prefix that every node reaches."""
    overrides: tuple[str, ...] = ()
    """What all trials have in common and the base has not."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Overrides by the variant's name; without any there is one, the base itself."""
    grid: dict[str, Annotated[tuple[Any, ...], MinLen(1)]] = Field(default_factory=dict)
    """Values of each key; every combination is tried."""
    search: dict[str, Distribution] = Field(default_factory=dict)
    """Where each key is drawn from. Instead of a grid."""
    num_samples: PositiveInt = 20
    """Draws of a search; the study's name decides them."""
    seeds: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] = (0,)
    """Each is a training of its own; the table has their mean and deviation."""
    epochs: PositiveInt | None = None
    """Epochs at most; None leaves what the base says."""
    patience: PositiveInt | None = None
    """Validations without a better NDCG@10 before a trial ends; None leaves what the base says."""
    halving: Halving | None = None
    """Ends weak trials early, besides patience. Only for a search."""
    evaluations: Annotated[dict[str, tuple[str, ...]], MinLen(1)] = Field(
        default_factory=lambda: {"test": ()}
    )
    """How each trained model is judged on the test split: overrides of keys of `evaluation`, by
    name. Choosing a checkpoint, or a trial, goes by the validation split alone."""
    by_length: bool = False
    """Whether the table tells users apart by length, in the buckets of each evaluation."""
    relative: bool = False
    """Whether the picture also shows each line as a share of its own first point: what is left
    under noise, say. For a grid, or several evaluations."""
    cpus_per_trial: PositiveFloat = 1.0
    """Reserved from Ray for a trial; its process takes the base's `workers.threads`. Fractions put
    several trials on one CPU."""
    max_concurrent: PositiveInt | None = None
    """Trials at the same time; None lets the cluster's CPUs decide."""
    max_failures: NonNegativeInt = 2
    """How often a trial whose process dies goes on from its checkpoint before it has failed."""
    tracking: TrackingConfig = TrackingConfig()
    """Which MLflow; the experiment is the study's name, whatever is here."""

    @model_validator(mode="after")
    def _combinations(self) -> "StudyConfig":
        if self.grid and self.search:
            raise ValueError("grid and search are both given: a study is one or the other")
        if self.halving is not None and not self.search:
            raise ValueError("halving would end trials that a table needs; it is for a search")
        if self.relative and (self.by_length or not (self.grid or len(self.evaluations) > 1)):
            raise ValueError("relative compares along a grid or several evaluations; there is none")
        if self.name in ("", ".", "..") or not all(c.isalnum() or c in "._-" for c in self.name):
            raise ValueError(
                f"name={self.name!r} becomes a folder: letters, digits, '.', '_' and '-' only"
            )
        for name, overrides in self.evaluations.items():
            for override in overrides:
                if not override.startswith("evaluation."):
                    raise ValueError(
                        f"evaluations: {name}: {override!r} is no key of evaluation; what changes "
                        "a training belongs into overrides, variants or grid"
                    )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} repeats one")
        return self
