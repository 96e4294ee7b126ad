"""The test split, read once for each trained trial with its best weights by validation."""

from collections.abc import Sequence

import ray
import torch

from distrl.contract import Method
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.store import read_manifest
from distrl.errors import CheckpointError
from distrl.schema import Config
from distrl.storage import exists, join, read_bytes, write_bytes
from distrl.study.trials import Trial, trial_folder
from distrl.train.evaluate import EvaluationResult, evaluate_local
from distrl.train.kept import KeptCheckpoints
from distrl.train.local import Validated
from distrl.train.saved import load_model
from distrl.watch import Say

ALL = "all"


class Figures(Config):
    """What one evaluation gave for users of one bucket of lengths."""

    evaluation: str
    length: str
    """`all`, or the bucket's label."""
    num_users: int
    metrics: dict[str, float]
    """`kept/ndcg_at_10`, `masked/hr_at_5`, ..."""


class Judged(Config):
    """A trained trial and its figures."""

    trial: str
    best: Validated
    """Its best validation, whose weights were judged."""
    last: Validated
    figures: tuple[Figures, ...]


def judge_all(
    trials: Sequence[Trial], study_uri: str, cpus_per_trial: float, say: Say
) -> list[Judged]:
    """Figures of all trials, in their order.

    Those that did not come to judge themselves, because they were ended early, are judged here,
    several side by side on Ray.

    Raises:
        CheckpointError: If a trial has no checkpoint, or it is torn.
    """
    so_far = {one.trial for one in judged_so_far(trials, study_uri)}
    task = ray.remote(judge_and_write).options(num_cpus=cpus_per_trial)
    waiting = {t.name: task.remote(t, study_uri) for t in trials if t.name not in so_far}
    for trial in trials:
        if trial.name in waiting:
            ray.get(waiting[trial.name])
            say(f"{trial.name} ({trial.label}) is judged on the test split")
    return judged_so_far(trials, study_uri)


def judged_so_far(trials: Sequence[Trial], study_uri: str) -> list[Judged]:
    """Figures of those trials that have any yet."""
    uris = [_uri(study_uri, trial) for trial in trials]
    return [Judged.model_validate_json(read_bytes(uri)) for uri in uris if exists(uri)]


def _uri(study_uri: str, trial: Trial) -> str:
    return join(study_uri, "evaluations", f"{trial.name}.json")


def judge_and_write(trial: Trial, study_uri: str) -> None:
    """Judges a trial for good, unless that is done."""
    uri = _uri(study_uri, trial)
    if not exists(uri):
        write_bytes(uri, judge(trial, study_uri).model_dump_json(indent=1).encode())


def judge(trial: Trial, study_uri: str) -> Judged:
    """Ranks the test split in every way that the study asks for, in this process.

    Raises:
        CheckpointError: If the trial has no checkpoint, or it is torn.
    """
    torch.set_num_threads(trial.run.workers.threads)
    kept = KeptCheckpoints.of(trial_folder(study_uri, trial.name))
    if kept.best is None:
        raise CheckpointError(f"trial {trial.name} has no checkpoint in {kept.uri}")
    with kept.files(kept.best) as files:
        manifest = read_manifest(trial.run.data.store_uri)
        method, _ = load_model(files, manifest.num_items)
    figures = [
        row
        for name, config in trial.evaluations.items()
        for row in _figures(name, _ranked(method, trial, config))
    ]
    return Judged(
        trial=trial.name,
        best=Validated.model_validate(kept.validations[kept.best_number]),
        last=Validated.model_validate(kept.validations[-1]),
        figures=tuple(figures),
    )


def _ranked(method: Method, trial: Trial, config: EvaluationConfig) -> EvaluationResult:
    data = trial.run.data
    return evaluate_local(method, data.max_len, data.store_uri, "test", config, baselines=False)


def _figures(name: str, result: EvaluationResult) -> list[Figures]:
    rows = [
        Figures(evaluation=name, length=ALL, num_users=result.num_users, metrics=result.metrics)
    ]
    for row in result.by_length:
        metrics = {key: value for key, value in row.items() if "/" in key}
        rows.append(
            Figures(
                evaluation=name, length=row["length"], num_users=row["num_users"], metrics=metrics
            )
        )
    return rows
