"""One run in one process: no Ray Train, no MLflow, the same training loop and the same numbers."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distrl.config import RunConfig
from distrl.data.beside import read_beside
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.samples import BatchMaker, empty_batch
from distrl.data.store import manifest_hash, read_manifest
from distrl.data.stream import local_batches
from distrl.engine.collectives import ensure_process_group
from distrl.schema import Config
from distrl.train.evaluate import evaluate_local
from distrl.train.kept import KeptCheckpoints
from distrl.train.loop import Curves, Step, Wishes, steps
from distrl.train.mending import MendingProbe
from distrl.train.monitor import SELECT_BY
from distrl.train.state import TrainingState
from distrl.train.validate import ALWAYS_CUTOFF

UNRANKED = -1.0
"""Score of a checkpoint of a stage that cannot rank yet: below that of any that can."""


class Validated(Config):
    """A training as far as one of its validations, or as one of the epochs before it can rank."""

    epoch: int
    """Passes over the store."""
    step: int
    metrics: dict[str, float]
    """On the validation split: `val/ndcg_at_10`, ... with seen items kept, `val/masked/...`; empty
    in a stage that cannot rank yet."""
    curves: dict[str, float]
    """Means of the loss terms since the validation before, `encoder/next_item`, ..., and what the
    method says of itself now, `augmenter/delete_recall`, ..."""
    seconds: float
    """Spent on steps since the run began, before a restart too; validations excluded."""
    targets: int
    """Next-item targets trained on since the run began."""

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by; `UNRANKED` without any ranking."""
        return self.metrics[SELECT_BY] if self.metrics else UNRANKED

    @property
    def targets_per_s(self) -> float:
        """Targets a second of training."""
        return self.targets / max(self.seconds, 1e-9)


@dataclass(slots=True)
class _Stretch:
    """Steps since the last validation."""

    seconds: float = 0.0
    targets: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, done: Step) -> None:
        now = time.perf_counter()
        self.seconds, self.targets = self.seconds + now - self.since, self.targets + done.targets
        self.since = now


def train_locally(run: RunConfig, folder_uri: str) -> Iterator[Validated]:
    """Trains a run from where its folder says to its end, and yields at each validation.

    Weights, optimizers and ledger are in the folder before a validation is yielded, so a process
    that dies afterwards loses nothing of it, and a consumer may stop after any. A stage that cannot
    rank yet yields as often, and once more at its end. Ends after `training.epochs`, or after
    `training.patience` validations without a better NDCG@10. A folder whose run has ended yields
    nothing. `workers` says the threads; its other settings do not count.

    Args:
        run: What to train.
        folder_uri: Where its checkpoints are, local or not; empty at first.

    Yields:
        Each validation that was not there before.

    Raises:
        DivergedError: If a loss is not finite.
        CheckpointError: If the folder holds the checkpoints of another run.
        ConfigError: If a table beside the store is asked for that is not there.
        SchemaError: If the store is torn.
        StorageError: If the store or the folder cannot be reached.
    """
    torch.set_num_threads(run.workers.threads)
    ensure_process_group("gloo")
    kept = KeptCheckpoints.of(folder_uri)
    history = [Validated.model_validate(entry) for entry in kept.validations]
    if history and is_over(run, history):
        return
    manifest = read_manifest(run.data.store_uri)
    state = TrainingState(run, manifest, manifest_hash(manifest), torch.device("cpu"))
    if kept.latest is not None:
        with kept.files(kept.latest) as files:
            state.load(files)
    beside = read_beside(run.data, manifest)
    maker = BatchMaker.of(run.data, state.method, manifest.num_items, run.seed, beside)
    mending = MendingProbe(state, manifest, maker)
    stream = local_batches(
        manifest, run.data, maker, epochs=run.training.epochs, ledger=state.ledger
    )
    curves, consumed, stretch = Curves(), state.ledger.total, _Stretch()
    try:
        for done in steps(
            state.method,
            state.engines,
            stream,
            empty=empty_batch(maker),
            already_consumed=consumed,
            curves=curves,
            seed=run.seed,
            first_step=state.step,
            rows_per_epoch=state.rows_per_epoch,
            wishes=Wishes(),
        ):
            state.took(done)
            stretch.add(done)
            before, consumed = consumed, consumed + done.samples
            epoch, finished = before // state.rows_per_epoch, consumed // state.rows_per_epoch
            if finished == epoch:
                continue
            judged = mending.judge(finished - 1)
            ranks = state.method.can_rank(finished - 1)
            begins_to_rank = state.method.can_rank(finished) and not ranks
            if not _is_due(run, epoch, finished) and not begins_to_rank:
                continue
            metrics = _ranked(state) if ranks else {}
            validated = _validated(state, metrics, curves.read() | dict(judged), stretch, history)
            history.append(validated)
            _keep(state, kept, validated)
            yield validated
            if is_over(run, history):
                return
            stretch = _Stretch()
    finally:
        stream.close()


def is_over(run: RunConfig, history: list[Validated]) -> bool:
    """Whether all epochs are trained, or patience is at its end."""
    scores = [validated.score for validated in history if validated.metrics]
    patience = run.training.patience
    tired = False
    if scores and patience is not None:
        tired = len(scores) - 1 - scores.index(max(scores)) >= patience
    return tired or history[-1].epoch >= run.training.epochs


def _is_due(run: RunConfig, before: int, now: int) -> bool:
    """Whether a step completed an epoch that is validated."""
    every, last = run.training.validate_every_epochs, run.training.epochs
    return now > before and (now // every > before // every or now >= last)


def _ranked(state: TrainingState) -> dict[str, float]:
    """The validation split, ranked with the weights as they are."""
    run = state.run
    # evaluate_local ranks a copy, which alone is put into eval mode.
    result = evaluate_local(
        state.method,
        run.data.max_len,
        run.data.store_uri,
        "validation",
        _selecting(run.evaluation),
        baselines=False,
    )
    return {f"val/{name.removeprefix('kept/')}": v for name, v in result.metrics.items()}


def _validated(
    state: TrainingState,
    metrics: dict[str, float],
    curves: dict[str, float],
    stretch: _Stretch,
    history: list[Validated],
) -> Validated:
    before = history[-1] if history else None
    return Validated(
        epoch=state.trained // state.rows_per_epoch,
        step=state.step,
        metrics=metrics,
        curves=curves,
        seconds=stretch.seconds + (before.seconds if before else 0.0),
        targets=stretch.targets + (before.targets if before else 0),
    )


def _selecting(config: EvaluationConfig) -> EvaluationConfig:
    """With the cutoff that the best checkpoint is chosen by."""
    cutoffs = tuple(sorted({*config.cutoffs, ALWAYS_CUTOFF}))
    return config.model_copy(update={"cutoffs": cutoffs})


def _keep(state: TrainingState, kept: KeptCheckpoints, validated: Validated) -> None:
    with tempfile.TemporaryDirectory(prefix="distrl-checkpoint-") as temporary:
        state.save(Path(temporary))
        kept.add(Path(temporary), validated.model_dump(mode="json"), validated.score)
