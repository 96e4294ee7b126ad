"""A study's trials on Ray Tune: placed, tried again, stopped early, taken up where they were."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler

from distrl.errors import DivergedError
from distrl.storage import exists, join, read_bytes, write_bytes
from distrl.study.config import StudyConfig
from distrl.study.judging import judge_and_write
from distrl.study.trials import Trial, trial_folder
from distrl.train.causes import cause
from distrl.train.local import Validated, train_locally
from distrl.train.monitor import SELECT_BY
from distrl.watch import Say

TUNE_FOLDER = "tune"
PROBLEM_FILE = "problem.txt"
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files a trial that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # its own would let an interrupted study go on to its table
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints whatever its verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a stage that cannot rank yet has no score
}
"""For Tune, which takes them from the environment alone."""


def problem_of(study_uri: str, trial: str) -> str | None:
    """What ended a trial that no repetition would mend."""
    uri = join(trial_folder(study_uri, trial), PROBLEM_FILE)
    return read_bytes(uri).decode() if exists(uri) else None


def run_trial(config: Mapping[str, Any], *, trials: Mapping[str, Trial], study_uri: str) -> None:
    """What a Tune trial runs: training to its own end, then judging.

    Its checkpoints are its own and not Tune's, whose record is up to seconds old when a driver
    dies: a trial that Tune starts once more finds in its folder all that it had done.

    Args:
        config: {"trial": name}, as Tune hands it out.
        trials: By name.
        study_uri: The study's folder.
    """
    trial = trials[config["trial"]]
    folder = trial_folder(study_uri, trial.name)
    try:
        for validated in train_locally(trial.run, folder):
            report = {"epoch": validated.epoch, "targets_per_s": validated.targets_per_s}
            # What cannot rank yet has no score that the scheduler could stop it by.
            ranked = {SELECT_BY: validated.score} if validated.metrics else {}
            tune.report({**report, **_losses(validated), **ranked})
    except DivergedError as error:
        write_bytes(join(folder, PROBLEM_FILE), str(error).encode())
    else:
        judge_and_write(trial, study_uri)


def _losses(validated: Validated) -> dict[str, float]:
    """The total of each phase that was trained."""
    return {name: value for name, value in validated.curves.items() if name.endswith("/total")}


def tune_trials(
    study: StudyConfig, trials: Sequence[Trial], study_uri: str, *, resume: bool, say: Say
) -> dict[str, str]:
    """Trains what is not finished yet, on a Ray that is connected already.

    Returns:
        What went wrong, by the name of each trial that failed.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    by_name = {trial.name: trial for trial in trials}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, trials=by_name, study_uri=study_uri),
        {"cpu": study.cpus_per_trial},
    )
    space = {"trial": tune.grid_search(list(by_name))}
    folder = join(study_uri, TUNE_FOLDER)
    if resume and tune.Tuner.can_restore(folder):
        tuner = tune.Tuner.restore(folder, trainable, resume_errored=True, param_space=space)
    else:
        tuner = _new_tuner(study, trials, study_uri, trainable, space, say)
    problems = {}
    for result in tuner.fit():
        name = (result.config or {})["trial"]
        problem = problem_of(study_uri, name)
        if result.error is not None:
            problem = str(cause(result.error)).strip().splitlines()[-1]
        if problem is not None:
            problems[name] = problem
    return problems


def _new_tuner(
    study: StudyConfig,
    trials: Sequence[Trial],
    study_uri: str,
    trainable: Any,  # noqa: ANN401
    space: dict[str, Any],
    say: Say,
) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(study, trials),
            max_concurrent_trials=study.max_concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=study_uri,
            failure_config=tune.FailureConfig(max_failures=study.max_failures),
            callbacks=[Tell(say, {trial.name: trial for trial in trials})],
            verbose=0,
        ),
    )


def _name(trial: TuneTrial) -> str:
    return trial.config["trial"]


def _scheduler(study: StudyConfig, trials: Sequence[Trial]) -> ASHAScheduler | None:
    """Tune's ASHA where the study asks for it, with epochs for its time."""
    if study.halving is None:
        return None
    return ASHAScheduler(
        time_attr="epoch",
        metric=SELECT_BY,
        mode="max",
        max_t=max(trial.run.training.epochs for trial in trials),
        grace_period=study.halving.grace_epochs,
        reduction_factor=study.halving.factor,
    )


def _standing(result: Mapping[str, Any]) -> str:
    """How good a trial is, or what it is at while it cannot rank."""
    if SELECT_BY in result:
        return f"validation NDCG@10 {result[SELECT_BY]:.4f}"
    losses = [f"{key} {value:.4f}" for key, value in result.items() if key.endswith("/total")]
    return "  ".join([*losses, "not ranking yet"])


class Tell(tune.Callback):
    """Tells the user how far the trials are."""

    def __init__(self, say: Say, trials: Mapping[str, Trial]) -> None:
        self._say, self._trials = say, trials
        self._over: set[str] = set()
        self._epochs: dict[str, int] = {}
        """Epochs that each trial had done when it was last heard of."""

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,  # noqa: ANN401
    ) -> None:
        """A line for each validation, and for each stretch of a stage that cannot rank yet."""
        ours = self._trials[_name(trial)]
        if "epoch" in result:
            self._say(
                f"{ours.name} ({ours.label})  epoch {result['epoch']}/{ours.run.training.epochs}  "
                f"{_standing(result)}  "
                f"{result['targets_per_s']:,.0f} targets/s{self._left(ours, result)}"
            )

    def _left(self, trial: Trial, result: dict[str, Any]) -> str:
        """How long a trial will take yet, by its epochs since it was last heard of."""
        before = self._epochs.get(trial.name)
        self._epochs[trial.name] = epoch = result["epoch"]
        if before is None and result["training_iteration"] > 1:
            return ""  # it goes on where another driver left it, and began who knows where
        seconds = result["time_this_iter_s"] / max(epoch - (before or 0), 1)
        left_s = seconds * (trial.run.training.epochs - epoch)
        return f"  at most {left_s:,.0f} s left" if left_s else ""

    def on_trial_complete(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        **info: Any,  # noqa: ANN401
    ) -> None:
        """A line for each trial that is over, its end or an early one."""
        self._over.add(_name(trial))
        self._say(f"{_name(trial)} is over; {len(self._over)} of {len(self._trials)} are")

    def on_trial_error(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        **info: Any,  # noqa: ANN401
    ) -> None:
        """A line for each process that died."""
        self._say(f"warning: {_name(trial)} failed; it goes on from its checkpoint, if it may")
