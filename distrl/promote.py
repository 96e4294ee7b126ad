"""From a registered version to the champion: both evaluated afresh, the gate, aliases, tags."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.store import manifest_hash, read_item_ids, read_manifest
from distrl.errors import ConfigError, TrackingError
from distrl.ops.metrics import METRICS
from distrl.schema import PAD_ID, Config, Split
from distrl.serving.artifact import read_artifact
from distrl.tracking.config import TrackingConfig, resolve_tracking_uri
from distrl.tracking.connection import check_reachable
from distrl.tracking.registry import CHAMPION, PREVIOUS, Registry, Version
from distrl.tracking.verdict import Gate, Verdict, judge
from distrl.train.evaluate import EvaluationResult, evaluate_model
from distrl.train.fleet import connect_for_ranking
from distrl.train.ranker import POPULARITY

Say = Callable[[str], None]


class PromoteConfig(Config):
    """Which version is compared with the champion, on what, and what it must show."""

    model: str = "distrl"
    """Name of the registered model."""
    version: PositiveInt | Literal["latest"] = "latest"
    """The version that may become champion."""
    store_uri: str
    """The sequence store that both versions are evaluated on."""
    split: Split = "test"
    seen: Literal["kept", "masked"] = "kept"
    """Whether items of the history stay candidates of the ranking that decides."""
    gate: Gate = Gate()
    evaluation: EvaluationConfig = EvaluationConfig()
    storage_uri: str = "runs"
    """Where runs are kept: decides the default tracking URI, as in training."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _measured(self) -> "PromoteConfig":
        if self.evaluation.protocol != "full":
            raise ValueError(
                f"evaluation.protocol={self.evaluation.protocol}: a gate compares versions by "
                "ranking the whole catalog, and figures of the sampled protocol are not comparable "
                "with those: leave protocol=full"
            )
        measured = {f"{name}_at_{k}" for name in METRICS for k in self.evaluation.cutoffs}
        unknown = sorted(self.gate.metrics - measured)
        if unknown:
            raise ValueError(
                f"gate names {', '.join(unknown)}; evaluation.cutoffs="
                f"{list(self.evaluation.cutoffs)} measures {', '.join(sorted(measured))}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Promotion:
    """What a promotion decided."""

    candidate: Version
    champion: Version | None
    """The champion that it was compared with."""
    verdict: Verdict


def promote(config: PromoteConfig, say: Say) -> Promotion:
    """Compares a version with the champion and, if it passes, moves the aliases.

    Raises:
        ConfigError: If the version is the champion already.
        TrackingError: If MLflow cannot be reached, or has no such model or version.
        SchemaError: If the store is torn.
        StorageError: If the store cannot be read.
    """
    registry = _registry(config)
    candidate = registry.version(config.model, config.version)
    champion = registry.alias(config.model, CHAMPION)
    previous = registry.alias(config.model, PREVIOUS)
    if champion is not None and champion.number == candidate.number:
        raise ConfigError(
            f"version={config.version}: {candidate.uri} is {config.model}@{CHAMPION} already"
        )
    manifest = read_manifest(config.store_uri)
    own_ids = read_item_ids(config.store_uri, manifest)
    connect_for_ranking(config.evaluation, len(manifest.sequences))

    say(f"evaluating {candidate.uri} on {config.store_uri}, split {config.split}")
    result = evaluate_version(config, registry, candidate, own_ids, baselines=True)
    rival = None
    if champion is not None:
        say(f"evaluating {champion.uri} ({config.model}@{CHAMPION})")
        rival = evaluate_version(config, registry, champion, own_ids, baselines=False)
    metrics = _chosen(result, config)
    rival_metrics = None if rival is None else _chosen(rival, config)
    verdict = judge(metrics, rival_metrics, config.gate)
    for line in _table(candidate, champion, result, rival, config):
        say(line)

    if verdict.promoted:
        old = None if champion is None else champion.number
        registry.move_aliases(
            config.model,
            expected={CHAMPION: old, PREVIOUS: None if previous is None else previous.number},
            wanted={PREVIOUS: old, CHAMPION: candidate.number},
        )
    outcome = "promoted" if verdict.promoted else "rejected"
    registry.tag(
        candidate,
        {
            "promotion.verdict": outcome,
            "promotion.reason": verdict.reason,
            "promotion.compared_with": "none" if champion is None else str(champion.number),
            "promotion.metrics": json.dumps({"candidate": metrics, "champion": rival_metrics}),
            "promotion.measured_on": f"{config.split}, seen {config.seen}, store "
            f"{manifest_hash(manifest)}",
            "promotion.time": _now(),
        },
    )
    say(f"{outcome}: {candidate.uri}: {verdict.reason}")
    if verdict.promoted:
        say(f"models:/{config.model}@{CHAMPION} is version {candidate.number}")
    return Promotion(candidate, champion, verdict)


def roll_back(config: PromoteConfig, say: Say) -> None:
    """Lets the champion and the previous champion change places.

    Raises:
        TrackingError: If MLflow cannot be reached, or there is no previous champion.
    """
    registry = _registry(config)
    champion = registry.alias(config.model, CHAMPION)
    previous = registry.alias(config.model, PREVIOUS)
    if champion is None or previous is None:
        missing = CHAMPION if champion is None else PREVIOUS
        raise TrackingError(
            f"{config.model} has no @{missing}, so there is nothing to roll back to"
        )
    now = {CHAMPION: champion.number, PREVIOUS: previous.number}
    wanted = {CHAMPION: previous.number, PREVIOUS: champion.number}
    registry.move_aliases(config.model, expected=now, wanted=wanted)
    registry.tag(champion, {"promotion.verdict": "rolled back", "promotion.time": _now()})
    say(
        f"models:/{config.model}@{CHAMPION} is version {previous.number} again; version "
        f"{champion.number} is @{PREVIOUS}"
    )


def evaluate_version(
    config: PromoteConfig,
    registry: Registry,
    version: Version,
    own_ids: pa.Array,
    *,
    baselines: bool,
) -> EvaluationResult:
    """Ranks the store's held-out items with a registered version.

    A version trained on another store numbers its items otherwise, so ids go through the caller's
    own; items it does not know are misses.
    """
    with tempfile.TemporaryDirectory(prefix="distrl-version-") as folder:
        artifact = read_artifact(registry.download(version, Path(folder)))
        same = artifact.items.equals(own_ids)
        item_map = None if same else np.concatenate([[PAD_ID], artifact.item_ids(own_ids)])
        return evaluate_model(
            artifact.method,
            artifact.catalog.max_len,
            config.store_uri,
            config.split,
            config.evaluation,
            item_map=item_map,
            baselines=baselines,
        )


def _registry(config: PromoteConfig) -> Registry:
    uri = resolve_tracking_uri(config.tracking, config.storage_uri)
    check_reachable(uri)
    return Registry(uri)


def _chosen(result: EvaluationResult, config: PromoteConfig) -> dict[str, float]:
    """The metrics that decide, without the prefix that says how seen items are treated."""
    prefix = f"{config.seen}/"
    return {
        name.removeprefix(prefix): value
        for name, value in result.metrics.items()
        if name.startswith(prefix)
    }


def _table(
    candidate: Version,
    champion: Version | None,
    result: EvaluationResult,
    rival: EvaluationResult | None,
    config: PromoteConfig,
) -> list[str]:
    """Candidate, champion and popularity side by side, with the relative change."""
    popularity = result.ranks[f"{POPULARITY}/{config.seen}"].metrics(config.evaluation.cutoffs)
    theirs: Mapping[str, float] = {} if rival is None else _chosen(rival, config)
    name = "no champion" if champion is None else f"champion v{champion.number}"
    lines = [
        f"{config.model}, {config.split}, seen items {config.seen}, {result.num_users} users",
        f"{'metric':<12}{f'candidate v{candidate.number}':>15}{name:>15}{'change':>10}"
        f"{'popularity':>12}",
    ]
    for metric, value in _chosen(result, config).items():
        other = theirs.get(metric)
        shown = "-" if other is None else f"{other:.5f}"
        change = f"{value / other - 1:+.1%}" if other else "-"
        lines.append(
            f"{metric:<12}{value:>15.5f}{shown:>15}{change:>10}{popularity[metric]:>12.5f}"
        )
    for version, measured in ((candidate, result), (champion, rival)):
        if version is not None and measured is not None and measured.num_unknown:
            lines.append(
                f"version {version.number} does not know the item or the history of "
                f"{measured.num_unknown} cases: they are misses"
            )
    return lines


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
