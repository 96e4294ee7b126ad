"""What each Ray Train worker runs: builds the parts, resumes, trains, and reports checkpoints."""

import json
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
from distrl.contract import Catalog, Method
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker, empty_batch
from distrl.data.stream import batches
from distrl.engine import checkpoint
from distrl.engine.collectives import ensure_process_group, gather_objects, rank, world_size
from distrl.engine.zero import Engines
from distrl.errors import DistrlError
from distrl.methods import build
from distrl.schema import Manifest
from distrl.train.collapse import CollapseProbe
from distrl.train.loop import Curves, Step, StopSignal, steps

LEDGER_FILE = "ledger.json"
PROGRESS_FILE = "progress.json"
RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What the driver tells every worker."""

    run: RunConfig
    manifest: Manifest
    store_hash: str
    monitor: Any
    """Handle of the actor that hosts the run's Monitor."""


def rows_per_epoch(run: RunConfig, manifest: Manifest) -> int:
    """Samples of one epoch: prefixes in the papers' protocol, otherwise users with a target."""
    prefix = run.data.samples == "prefix"
    return manifest.num_prefixes if prefix else manifest.num_trainable_rows


def train_worker(task: dict[str, Any]) -> dict[str, Any]:
    """Trains one worker's share from the latest checkpoint to the end of the stream.

    Args:
        task: {"task": WorkerTask}; Ray Train wants a dictionary.

    Returns:
        {"steps": int, "error": DistrlError or None}. A loss that is not finite, or a torn shard, is
        an answer and not an exception: Ray would start the workers again to see it once more.
    """
    worker = _Worker(task["task"])
    try:
        worker.train()
    except DistrlError as error:
        return {"steps": worker.step, "error": error}
    return {"steps": worker.step, "error": None}


class _Worker:
    """State of one worker between checkpoints."""

    def __init__(self, task: WorkerTask) -> None:
        self.task = task
        self.run = task.run
        torch.set_num_threads(self.run.workers.threads)
        ensure_process_group("nccl" if self.run.workers.use_gpu else "gloo")
        on_gpu = self.run.workers.use_gpu
        self.device = get_device() if on_gpu else torch.device("cpu")
        self.method = self._build()
        self.engines = Engines(
            self.method,
            self.run.engine,
            device=self.device,
            micro_batch_size=self.run.data.batch_size // world_size(),
            num_workers=world_size(),
        )
        self.rows_per_epoch = rows_per_epoch(self.run, task.manifest)
        self.ledger = Ledger(task.store_hash)
        self.new = Ledger(task.store_hash)
        self.step = 0
        self.waited_s = 0.0
        self.views = CollapseProbe(self.method, self.engines)
        self._resume()

    def _build(self) -> Method:
        """Every rank draws the same weights."""
        torch.manual_seed(self.run.seed)
        catalog = Catalog(self.task.manifest.num_items, self.run.data.max_len)
        return build(self.run.method, catalog)

    def _resume(self) -> None:
        """Weights, optimizers, ledger and step of the checkpoint that Ray hands out, if any."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return
        with latest.as_directory() as folder:
            path = Path(folder)
            checkpoint.load(self.engines, path)
            self.ledger = Ledger.from_json((path / LEDGER_FILE).read_text(), self.task.store_hash)
            self.step = json.loads((path / PROGRESS_FILE).read_text())["step"]

    def train(self) -> None:
        """Reads the stream to its end, checkpointing on the way."""
        run, training = self.run, self.run.training
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None, "the launcher gives every worker a part of the stream"
        maker = BatchMaker(run.data, self.method.num_views, self.task.manifest.num_items, run.seed)
        stream = batches(shard, run.data, maker, batch_size=run.data.batch_size // world_size())
        curves, stop = Curves(), StopSignal()
        consumed = self.ledger.total
        meter = _Meter(consumed, self.rows_per_epoch * training.epochs)
        for done in steps(
            self.method,
            self.engines,
            self.views.watched(((batch.to(self.device)), taken) for batch, taken in stream),
            empty=empty_batch(self.method.num_views, run.data).to(self.device),
            already_consumed=consumed,
            curves=curves,
            seed=run.seed,
            first_step=self.step,
            rows_per_epoch=self.rows_per_epoch,
            asks_to_stop=stop,
        ):
            self.step = done.step
            if done.consumed is not None:
                taken = done.consumed
                self.new.add(taken.epoch, taken.shard, taken.serial)
            before, consumed = consumed, consumed + done.samples
            meter.add(done, stream.waited_s)
            if done.step % training.log_every_steps == 0:
                self._log(meter, curves, consumed)
            finished = consumed // self.rows_per_epoch
            every = training.checkpoint_every_steps
            if finished > before // self.rows_per_epoch:
                self._log(meter, curves, consumed)
                due = finished % training.validate_every_epochs == 0 or finished >= training.epochs
                self._checkpoint(validate=due)
                stop.wished = rank() == 0 and ray.get(self.task.monitor.should_stop.remote())
            elif every is not None and done.step % every == 0:
                self._checkpoint(validate=False)
            if done.stop:
                break
        if self._has_news():
            self._checkpoint(validate=True)

    def _has_news(self) -> bool:
        """Whether any rank trained on something since the last checkpoint. Collective."""
        return any(gather_objects(self.new.total))

    def _log(self, meter: "_Meter", curves: Curves, consumed: int) -> None:
        """Curves and progress to the monitor, from one rank, without waiting. Collective."""
        means = curves.read()
        waits = gather_objects(meter.waited_share())
        if rank() == 0:
            progress = meter.progress(self.step, consumed, self.rows_per_epoch)
            progress["wait_share"] = max(waits)
            progress["waited_s"] = meter.waited_s
            speed = {
                "system/wait_share": max(waits),
                "system/targets_per_s": progress["targets_per_s"],
                "epoch": consumed / self.rows_per_epoch,
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
            self.task.monitor.measured.remote(self.step, measured)
        for other in gather_objects(self.new):
            self.ledger.merge(other)
        self.new = Ledger(self.task.store_hash)
        folder = Path(tempfile.mkdtemp(prefix="distrl-checkpoint-"))
        checkpoint.save(self.engines, folder)
        epoch = self.ledger.total / self.rows_per_epoch
        if rank() == 0:
            (folder / LEDGER_FILE).write_text(self.ledger.to_json())
            (folder / PROGRESS_FILE).write_text(json.dumps({"step": self.step, "epoch": epoch}))
            (folder / RUN_FILE).write_text(self.run.model_dump_json(indent=1))
        held = Checkpoint.from_directory(folder) if rank() == 0 else None
        if held is None:
            shutil.rmtree(folder)
        ray.train.report(
            {"step": self.step, "epoch": epoch},
            checkpoint=held,
            checkpoint_dir_name=f"checkpoint-{self.step:09d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            validation=ValidationTaskConfig(fn_kwargs={"step": self.step, "epoch": epoch})
            if validate and held is not None
            else False,
        )


def _totals(means: dict[str, float]) -> dict[str, float]:
    """The next-item loss under the name that the progress line prints."""
    found = [value for key, value in means.items() if key.endswith("/next_item")]
    return {"loss": found[0]} if found else {}


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
