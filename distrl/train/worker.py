"""What each Ray Train worker runs: builds the parts, resumes, trains, and reports checkpoints."""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode, ValidationTaskConfig
from ray.train.torch import get_device

from distrl.config import RunConfig
from distrl.data.beside import read_beside
from distrl.data.samples import BatchMaker, empty_batch
from distrl.data.stream import batches
from distrl.engine.collectives import (
    broadcast_object,
    ensure_process_group,
    gather_objects,
    rank,
    together,
    world_size,
)
from distrl.errors import DistrlError, StorageError
from distrl.schema import Manifest
from distrl.train.collapse import CollapseProbe
from distrl.train.examples import item_names, page
from distrl.train.loop import Curves, Step, Wishes, steps
from distrl.train.mending import MendingProbe
from distrl.train.state import TrainingState


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What the driver tells every worker."""

    run: RunConfig
    manifest: Manifest
    store_hash: str
    monitor: Any
    """Handle of the actor that hosts the run's Monitor."""


def train_worker(task: dict[str, Any]) -> dict[str, Any]:
    """Trains one worker's share from the latest checkpoint to the end of the stream.

    Args:
        task: {"task": WorkerTask}; Ray Train wants a dictionary.

    Returns:
        {"steps": int, "error": DistrlError or None}. A loss that is not finite, or a torn shard, is
        an answer and not an exception: Ray would start the workers again to see it once more.

    Raises:
        StorageError: If the store cannot be read; it may be there again when Ray starts the workers
            again.
    """
    steps_taken = 0
    try:
        worker = _Worker(task["task"])
        try:
            worker.train()
        finally:
            steps_taken = worker.state.step
    except StorageError:
        raise
    except DistrlError as error:
        return {"steps": steps_taken, "error": error}
    return {"steps": steps_taken, "error": None}


class _Worker:
    """State of one worker between checkpoints."""

    def __init__(self, task: WorkerTask) -> None:
        self.task = task
        self.run = task.run
        torch.set_num_threads(self.run.workers.threads)
        ensure_process_group("nccl" if self.run.workers.use_gpu else "gloo")
        on_gpu = self.run.workers.use_gpu
        self.device = get_device() if on_gpu else torch.device("cpu")
        self.state = TrainingState(self.run, task.manifest, task.store_hash, self.device)
        self.views = CollapseProbe(self.state.method, self.state.engines)
        self._resume()

    def _resume(self) -> None:
        """What the checkpoint holds that Ray hands out, if any."""
        latest = ray.train.get_checkpoint()
        if latest is not None:
            with latest.as_directory() as folder:
                self.state.load(Path(folder))

    def train(self) -> None:
        """Reads the stream to its end, checkpointing on the way."""
        run, training, state = self.run, self.run.training, self.state
        if state.ledger.total and self._has_stopped():
            return
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None, "the launcher gives every worker a part of the stream"
        manifest = self.task.manifest
        beside = together(lambda: read_beside(run.data, manifest))
        maker = BatchMaker.of(run.data, state.method, manifest.num_items, run.seed, beside)
        self.mending = together(lambda: MendingProbe(state, manifest, maker))
        stream = batches(shard, run.data, maker, batch_size=run.data.batch_size // world_size())
        curves, wishes, saved_at = Curves(), Wishes(), time.monotonic()
        consumed = state.ledger.total
        meter = _Meter(consumed, state.rows_per_epoch * training.epochs)
        for done in steps(
            state.method,
            state.engines,
            self.views.watched(((batch.to(self.device)), taken) for batch, taken in stream),
            empty=empty_batch(maker).to(self.device),
            already_consumed=consumed,
            curves=curves,
            seed=run.seed,
            first_step=state.step,
            rows_per_epoch=state.rows_per_epoch,
            wishes=wishes,
        ):
            state.took(done)
            before, consumed = consumed, consumed + done.samples
            meter.add(done, stream.waited_s)
            if done.step % training.log_every_steps == 0:
                self._log(meter, curves, consumed)
            finished = consumed // state.rows_per_epoch
            every = training.checkpoint_every_steps
            saves = done.save or (every is not None and done.step % every == 0)
            ends = finished > before // state.rows_per_epoch
            if ends or saves:
                saved_at = time.monotonic()
            wishes.save = rank() == 0 and self._is_due(saved_at)
            if ends:
                self._log(meter, curves, consumed)
                self._judge(finished - 1)
                due = finished % training.validate_every_epochs == 0 or finished >= training.epochs
                self._checkpoint(validate=due and state.method.can_rank(finished - 1))
                wishes.stop = rank() == 0 and ray.get(self.task.monitor.should_stop.remote())
            elif saves:
                self._checkpoint(validate=False)
            if done.stop:
                self._show_examples(consumed // state.rows_per_epoch - 1)
                break
        if state.has_news():
            self._checkpoint(validate=True)

    def _has_stopped(self) -> bool:
        """Whether patience had already ended the training that a checkpoint is of. Collective."""
        asked = rank() == 0 and ray.get(self.task.monitor.should_stop.remote())
        return broadcast_object(bool(asked))

    def _is_due(self, saved_at: float) -> bool:
        minutes = self.run.training.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - saved_at >= 60 * minutes

    def _judge(self, epoch: int) -> None:
        """What the method says of itself after an epoch. Collective."""
        figures = self.mending.judge(epoch)
        if rank() == 0 and figures:
            self.task.monitor.measured.remote(self.state.step, dict(figures))
        method, is_last = self.state.method, epoch + 1 >= self.run.training.epochs
        if is_last or method.can_rank(epoch) != method.can_rank(epoch + 1):
            self._show_examples(epoch)

    def _show_examples(self, epoch: int) -> None:
        """What the method makes of some sequences, as a page in MLflow. Collective."""
        examples = self.mending.examples()
        if rank() != 0 or not examples:
            return
        items = {item for rows in examples.values() for row in rows for item, _ in row}
        names = self._names(items)
        name = f"augmenter/examples-epoch-{epoch + 1:03d}.md"
        self.task.monitor.wrote.remote(name, page(examples, names))

    def _names(self, items: set[int]) -> dict[int, str]:
        """What items are called; by their ids alone, and the user told, where texts are no good."""
        data, manifest = self.run.data, self.task.manifest
        for texts in dict.fromkeys((data.item_text_uri, None)):
            try:
                return item_names(items, data.store_uri, manifest, texts)
            except DistrlError as error:
                # This worker alone reads them: the others could not end with it.
                self.task.monitor.tell.remote(f"warning: examples show ids and no titles: {error}")
        return {}

    def _log(self, meter: "_Meter", curves: Curves, consumed: int) -> None:
        """Curves and progress to the monitor, from one rank, without waiting. Collective."""
        means = curves.read()
        waits = gather_objects(meter.waited_share())
        if rank() == 0:
            progress = meter.progress(self.state.step, consumed, self.state.rows_per_epoch)
            progress["wait_share"] = max(waits)
            progress["waited_s"] = meter.waited_s
            speed = {
                "system/wait_share": max(waits),
                "system/targets_per_s": progress["targets_per_s"],
                "epoch": consumed / self.state.rows_per_epoch,
            }
            self.task.monitor.report.remote({**progress, **_totals(means)}, {**means, **speed})
        meter.restart()

    def _checkpoint(self, *, validate: bool) -> None:
        """Commits weights, optimizers and ledger together; uploads beside training. Collective.

        The views are measured here, so that figures belong to weights that can be looked at again,
        and cost little beside what they come with.
        """
        measured = self.views.read()
        if rank() == 0 and measured:
            self.task.monitor.measured.remote(self.state.step, measured)
        folder = Path(tempfile.mkdtemp(prefix="distrl-checkpoint-"))
        epoch, step = self.state.save(folder), self.state.step
        held = Checkpoint.from_directory(folder) if rank() == 0 else None
        if held is None:
            shutil.rmtree(folder)
        ray.train.report(
            {"step": step, "epoch": epoch},
            checkpoint=held,
            checkpoint_dir_name=f"checkpoint-{step:09d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            validation=ValidationTaskConfig(fn_kwargs={"step": step, "epoch": epoch})
            if validate and held is not None
            else False,
        )


def _totals(means: dict[str, float]) -> dict[str, float]:
    """The loss that the progress line prints: of the next item, or of a stage that has none."""
    for name in ("/next_item", "/total"):
        for key, value in means.items():
            if key.endswith(name):
                return {"loss": value}
    return {}


class _Meter:
    """Rates since the last line of progress, and since the start."""

    def __init__(self, consumed: int, total: int) -> None:
        self.started = self.since = time.perf_counter()
        self.first, self.total = consumed, total
        self.targets = self.all_targets = 0
        self.waited_s = self.waited_before_s = 0.0

    def add(self, done: Step, waited_s: float) -> None:
        self.targets += done.targets
        self.all_targets += done.targets
        self.waited_s = waited_s

    def waited_share(self) -> float:
        """Share of the time since the last restart that this worker waited for data."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        return (self.waited_s - self.waited_before_s) / elapsed

    def progress(self, step: int, consumed: int, rows_per_epoch: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (consumed - self.first) / max(now - self.started, 1e-9)
        return {
            "step": step,
            "epoch": consumed / rows_per_epoch,
            "rows_per_s": rate,
            "targets_per_s": self.targets / max(now - self.since, 1e-9),
            "eta_s": (self.total - consumed) / max(rate, 1e-9),
            "elapsed_s": now - self.started,
            "all_targets": self.all_targets,
            "epochs_done": (consumed - self.first) / rows_per_epoch,
        }

    def restart(self) -> None:
        self.since, self.targets = time.perf_counter(), 0
        self.waited_before_s = self.waited_s
