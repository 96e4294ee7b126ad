"""One frozen object describes a run: the sections of the floors below, YAML, and overrides.

`section.key=value` changes a file's value; an unknown key, a wrong type or an impossible
combination is one ConfigError that names each of them, on the driver, before Ray starts.
"""

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from annotated_types import Ge
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from distrl.data.config import DataConfig
from distrl.data.evaluation_config import EvaluationConfig
from distrl.engine.config import EngineConfig
from distrl.errors import ConfigError
from distrl.methods import MethodConfig
from distrl.schema import Config
from distrl.tracking.config import TrackingConfig

C = TypeVar("C", bound=Config)


class WorkersConfig(Config):
    """Who trains, and on what."""

    num_workers: PositiveInt = 1
    use_gpu: bool = False
    """One GPU a worker, NCCL between them; otherwise gloo on CPUs."""
    cpus_per_worker: PositiveFloat = 1.0
    """Reserved from Ray for each worker; fractions are fine on a laptop."""
    threads: PositiveInt = 1
    """Compute threads of a worker's process."""
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """Further Ray resources for each worker, such as {"accelerator_type:H200": 0.001}."""
    max_failures: Annotated[int, Ge(-1)] = 3
    """How often a worker group is started again from the last checkpoint before the run fails; -1:
    without end, for runs of days on nodes that come and go. Lost nodes that the cluster announced
    are not counted."""
    start_timeout_s: PositiveFloat = 120.0
    """How long Ray waits for the cluster to place all workers before it asks anew, which it does
    without end: a cluster that lost a node is waited for."""


class TrainingConfig(Config):
    """How long, how often saved, and when to stop."""

    epochs: PositiveInt = 30
    """Passes over the store. An epoch is rows consumed over rows in the store."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints, besides the one at the end of each epoch; None: epochs alone."""
    checkpoint_every_minutes: PositiveFloat | None = 30.0
    """Minutes after the last checkpoint, or the start, at which another one is made: the most that
    a lost node costs. None: whatever an epoch takes."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept: the best by validation, and the latest always."""
    validate_every_epochs: PositiveInt = 1
    patience: PositiveInt | None = 10
    """Validations without a better NDCG@10 before training stops; None trains all epochs."""
    log_every_steps: PositiveInt = 20
    """Steps between two points of the curves in MLflow."""
    progress_every_s: PositiveFloat = 5.0
    """Seconds between two lines of progress."""


class RunConfig(Config):
    """Everything that describes one training run."""

    name: str
    """The run's name: its folder under `storage_uri`, and its name in MLflow. Used once."""
    seed: NonNegativeInt = 0
    storage_uri: str = "runs"
    """Where runs are kept: a local folder or s3://bucket/prefix that every node reaches."""
    commit: str | None = None
    """Commit of the code, for a submitted job: its working directory has no history to ask. None
    asks git."""
    registered_model: str = "distrl"
    """Name under which the best model becomes a version in the registry."""
    method: MethodConfig
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        workers, batch = self.workers.num_workers, self.data.batch_size
        if batch % workers:
            raise ValueError(
                f"data.batch_size={batch} is not a multiple of workers.num_workers={workers}"
            )
        if batch // workers < 2:
            raise ValueError(
                f"data.batch_size={batch} over workers.num_workers={workers} leaves "
                f"{batch // workers} sample a worker; a contrast needs at least 2"
            )
        if self.method.takes_neighbors and self.data.neighbors is None:
            raise ValueError(
                f"method.name={self.method.name} learns from neighbors by text: data.neighbors "
                "must name a table that jobs/retrieve.py made"
            )
        if self.data.neighbors is not None and not self.method.takes_neighbors:
            raise ValueError(
                f"data.neighbors={self.data.neighbors}, but method.name={self.method.name} takes "
                "none; leave it out, or train sracl with this method as its base"
            )
        before = self.method.epochs_before_ranking
        if self.training.epochs <= before:
            raise ValueError(
                f"training.epochs={self.training.epochs} leaves no epoch to the recommender after "
                f"method.pretrain_epochs={before}"
            )
        if self.evaluation.protocol != "full":
            raise ValueError(
                f"evaluation.protocol={self.evaluation.protocol}: a training chooses and registers "
                "its model by ranking the whole catalog; rank its checkpoint or version afterwards "
                f"with jobs/evaluate.py --protocol {self.evaluation.protocol}"
            )
        decay_epochs = self.engine.decay_epochs
        if decay_epochs is not None and decay_epochs < self.training.epochs:
            raise ValueError(
                f"engine.decay_epochs={decay_epochs:g} ends before training.epochs="
                f"{self.training.epochs}; the epochs after it would have a learning rate of zero"
            )
        if self.name in (".", "..") or not all(c.isalnum() or c in "._-" for c in self.name):
            raise ValueError(
                f"name={self.name!r} becomes a folder: letters, digits, '.', '_' and '-' only"
            )
        return self


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str]) -> C:
    """The config of a YAML file with overrides applied, checked whole.

    Args:
        cls: The config's class.
        path: A YAML file; None starts from nothing.
        overrides: `section.key=value`, the value in YAML. Lists are replaced, not merged.

    Raises:
        ConfigError: Naming every unknown key, wrong value and impossible combination at once.
    """
    settings = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply(settings, override)
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        where = "the overrides" if path is None else str(path)
        lines = [_explain(cls, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"config {path} holds no keys; it must map sections to values")
    return settings


def _apply(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        inner = settings.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        settings = inner
    try:
        settings[key] = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _explain(cls: type[Config], problem: Any) -> str:  # noqa: ANN401
    """One problem of pydantic's as `section.key=value: what is wrong`."""
    names = [str(part) for part in problem["loc"]]
    key = ".".join(name for name in names if name not in _tags(cls)) or "config"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(_keys(cls)), n=1, cutoff=0.6)
        return f"{key}: unknown key" + (f" (did you mean {near[0]}?)" if near else "")
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    if isinstance(value, dict | BaseModel):
        return f"{key}: {message}" if key != "config" else message
    return f"{key}={value!r}: {message}"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401
    """The config classes inside an annotation, through unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)


def _tags(cls: type[Config]) -> set[str]:
    """Names that pydantic puts into a path for the chosen member of a union."""
    tags = set()
    for field in cls.model_fields.values():
        for model in _models(field.annotation):
            name = model.model_fields.get("name")
            if name is not None and typing.get_origin(name.annotation) is Literal:
                tags.update(typing.get_args(name.annotation))
            tags |= _tags(typing.cast("type[Config]", model))
    return tags


def _keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config knows."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for model in _models(field.annotation):
            yield from _keys(model, f"{prefix}{name}.")
