"""From a config to a trained run: checks on the driver, then Ray Train, watched from the driver."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    ScalingConfig,
    ValidationConfig,
)
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distrl.cluster import Need, check_capacity, connect, live_nodes
from distrl.config import RunConfig
from distrl.data.beside import beside_hashes
from distrl.data.side_tables import SideManifest
from distrl.data.store import check_sizes, manifest_hash, read_manifest
from distrl.data.stream import StreamSplit
from distrl.errors import CheckpointError, TrackingError
from distrl.folder import RESULT_FILE, RunFolder
from distrl.outage import through_outages
from distrl.outcome import Outcome, conclude
from distrl.remaining import Remaining
from distrl.schema import Manifest
from distrl.storage import absolute, check_writable, join
from distrl.tracking.config import resolve_tracking_uri
from distrl.tracking.connection import check_reachable
from distrl.tracking.runs import finish_run
from distrl.train.causes import cause
from distrl.train.checks import check_run
from distrl.train.fleet import ranking_need
from distrl.train.monitor import SELECT_BY, Monitor
from distrl.train.size import size_lines
from distrl.train.validate import validate
from distrl.train.worker import WorkerTask, train_worker
from distrl.waiting import once_there
from distrl.watch import Say, TellFailures, Watch

_SIZE_KEYS = "workers.num_workers, workers.cpus_per_worker or evaluation.num_workers"


def fit(run: RunConfig, *, resume: bool, say: Say) -> Outcome:
    """Trains, evaluates and registers what a config describes.

    Args:
        run: The resolved config.
        resume: Go on with the run of this name; without it the name must be new.
        say: Takes lines of progress for the user.

    Raises:
        ConfigError: If the name is used, a resumed run was another, the cluster is too small, or a
            table beside the store is asked for that is not there.
        StorageError: If the store or the storage cannot be reached.
        SchemaError: If the store is torn.
        TrackingError: If MLflow cannot be reached.
        DivergedError: If a loss is not finite.
    """
    run = _with_absolute_places(run)
    manifest = read_manifest(run.data.store_uri)
    check_sizes(run.data.store_uri, manifest)
    neighbors = check_run(run, manifest)
    check_writable(run.storage_uri)
    folder = RunFolder(join(run.storage_uri, run.name))
    folder.check_name(resume=resume)
    tracking_uri = resolve_tracking_uri(run.tracking, run.storage_uri)
    check_reachable(tracking_uri)
    if resume and folder.is_finished():
        say(f"run {run.name} is finished; nothing to resume")
        outcome = Outcome.model_validate_json(folder.read(RESULT_FILE))
        finish_run(tracking_uri, outcome.run_id, "FINISHED")
        return outcome

    needs = _needs(run, len(manifest.sequences))
    connect(sum(need.total("CPU") for need in needs))
    check_capacity(needs, keys=_SIZE_KEYS)
    made_of = {"store_manifest": manifest_hash(manifest), **beside_hashes(run.data, manifest)}
    run_id = folder.open(run, made_of, tracking_uri, resume=resume)
    say(f"run {run.name}: {folder.uri}")
    say(f"MLflow run {run_id} in experiment {run.tracking.experiment}")
    for line in size_lines(run, manifest.num_items, _worker_resources(run), live_nodes()):
        say(line)
    try:
        best, speed = _train(run, manifest, neighbors, folder, tracking_uri, run_id, say)
        outcome = conclude(run, manifest, folder, tracking_uri, run_id, best, speed, say)
        # The result comes before the status: without it a resumed run would conclude once more.
        result = outcome.model_dump_json(indent=1)
        once_there(lambda: folder.write(RESULT_FILE, result), say)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        # What went wrong first is what the user must read, not that MLflow is away too.
        with contextlib.suppress(TrackingError):
            finish_run(tracking_uri, run_id, status)
        raise
    finish_run(tracking_uri, run_id, "FINISHED")
    return outcome


def _with_absolute_places(run: RunConfig) -> RunConfig:
    """Workers have other working directories than the driver."""
    data, texts = {"store_uri": absolute(run.data.store_uri)}, run.data.item_text_uri
    if texts is not None:
        data["item_text_uri"] = absolute(texts)
    changed = {"storage_uri": absolute(run.storage_uri), "data": run.data.model_copy(update=data)}
    return run.model_copy(update=changed)


def _needs(run: RunConfig, num_shards: int) -> list[Need]:
    """What a run on a store of so many shards takes from the cluster at the same time."""
    return [
        Need("training workers", _worker_resources(run), run.workers.num_workers),
        Need("reading tasks", {"CPU": run.data.read_cpus}, run.data.read_tasks),
        ranking_need(run.evaluation, num_shards),
    ]


def _worker_resources(run: RunConfig) -> dict[str, float]:
    resources = {**run.workers.resources_per_worker, "CPU": run.workers.cpus_per_worker}
    return {**resources, "GPU": 1.0} if run.workers.use_gpu else resources


def _train(
    run: RunConfig,
    manifest: Manifest,
    neighbors: SideManifest | None,
    folder: RunFolder,
    tracking_uri: str,
    run_id: str,
    say: Say,
) -> tuple[Checkpoint, dict[str, float]]:
    """Runs Ray Train to its end; the best checkpoint by validation, and how fast it went."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray's handle types have no stubs.
    monitor: Any = (
        ray.remote(Monitor)
        .options(
            num_cpus=0,
            scheduling_strategy=here,
            max_concurrency=1,
            # It knows again from the run's folder and from MLflow what it was told, but for points
            # of curves that were on their way; none of its methods minds being called twice.
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(tracking_uri, run_id, folder.at("validations.json"), run.training.patience)
    )
    trainer = partial(_trainer, run, manifest, neighbors, folder, monitor)
    with Watch(monitor, run.training, say):
        try:
            result = through_outages(
                lambda: _attempt(trainer()), folder.uri, run.workers.max_failures, say
            )
        except (ray.train.TrainingFailedError, RayError) as error:
            raise cause(error) from error
        finally:
            _deliver(monitor, folder, say)
    error = (result.return_value or {}).get("error")
    if error is not None:
        raise error
    return _best(result, folder), ray.get(monitor.speed.remote())


def _attempt(trainer: TorchTrainer) -> ray.train.Result:
    with _own_interrupts():
        try:
            return trainer.fit()
        except SystemExit as ended:
            # Ray's own handler of Ctrl-C ends this process without a word once workers have ended.
            raise KeyboardInterrupt from ended


def _best(result: ray.train.Result, folder: RunFolder) -> Checkpoint:
    validated = [found for found in result.best_checkpoints or [] if SELECT_BY in found[1]]
    if not validated:
        raise CheckpointError(
            f"no checkpoint of {folder.uri} is validated, so none can be chosen: its rankings "
            "failed, as the warnings say; jobs/evaluate.py ranks with any checkpoint there"
        )
    return max(validated, key=lambda found: found[1][SELECT_BY])[0]


def _trainer(
    run: RunConfig,
    manifest: Manifest,
    neighbors: SideManifest | None,
    folder: RunFolder,
    monitor: Any,  # noqa: ANN401
) -> TorchTrainer:
    """One attempt at training; Ray has it begin at the last checkpoint in the run's folder."""
    store_hash = manifest_hash(manifest)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(run.workers.start_timeout_s)
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": WorkerTask(run, manifest, store_hash, monitor)},
        datasets={"train": Remaining(run, manifest, neighbors, folder.uri, store_hash)},
        dataset_config=StreamSplit(run.data.read_ahead_bytes),
        scaling_config=ScalingConfig(
            num_workers=run.workers.num_workers,
            use_gpu=run.workers.use_gpu,
            resources_per_worker=_worker_resources(run),
        ),
        torch_config=TorchConfig(backend="nccl" if run.workers.use_gpu else "gloo"),
        validation_config=ValidationConfig(
            fn=validate,  # pyright: ignore[reportArgumentType]  # Ray types it as taking anything
            task_config=_validation_task(run, monitor),
            # The task ranks by itself where no ranking workers are asked for.
            ray_remote_kwargs=_validation_resources(run),
        ),
        run_config=RayRunConfig(
            name=run.name,
            storage_path=run.storage_uri,
            failure_config=FailureConfig(max_failures=run.workers.max_failures),
            callbacks=[TellFailures(monitor)],
            checkpoint_config=CheckpointConfig(
                num_to_keep=run.training.keep_checkpoints,
                checkpoint_score_attribute=SELECT_BY,
                checkpoint_score_order="max",
            ),
        ),
    )


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Gives Ctrl-C back to Python afterwards: Ray's handler stays, and would swallow it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _validation_resources(run: RunConfig) -> dict[str, float]:
    ranking = run.evaluation
    if ranking.num_workers:
        return {"num_cpus": 0}
    return {"num_cpus": ranking.cpus_per_worker, "num_gpus": ranking.gpus_per_worker}


def _validation_task(run: RunConfig, monitor: Any) -> ray.train.ValidationTaskConfig:  # noqa: ANN401
    settings = {"store_uri": run.data.store_uri, "config": run.evaluation, "monitor": monitor}
    return ray.train.ValidationTaskConfig(fn_kwargs=settings)


def _deliver(monitor: Any, folder: RunFolder, say: Say) -> None:  # noqa: ANN401
    """What MLflow could not take goes into a file beside the run, and the user is told."""
    try:
        undelivered = ray.get(monitor.close.remote(30.0))
    except RayError as error:
        # What ended the run, if anything did, is what the user must read.
        say(f"warning: the run's monitor died, and curves may have gaps: {error}")
        return
    if undelivered:
        folder.write("undelivered-metrics.json", json.dumps(undelivered))
        say(
            f"warning: MLflow did not take {len(undelivered)} points of the curves; "
            f"they are in {folder.at('undelivered-metrics.json')}"
        )
