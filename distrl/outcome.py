"""What follows training: the test table, the pictures, and a version in the registry."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from ray.train import Checkpoint

from distrl.config import RunConfig
from distrl.data.store import manifest_hash, read_item_ids
from distrl.folder import RunFolder
from distrl.schema import Config, Manifest
from distrl.serving.artifact import Artifact, write_artifact
from distrl.storage import write_bytes
from distrl.tracking.curves import curves, picture
from distrl.tracking.model import log_model
from distrl.tracking.registry import Registry, Version
from distrl.tracking.run_log import RunLog
from distrl.train import report
from distrl.train.evaluate import EvaluationResult, evaluate_model
from distrl.train.saved import load_model, model_files

FLUSH_S = 60.0


class Outcome(Config):
    """A finished run, as `result.json` beside it says."""

    name: str
    run_id: str
    """Of the one MLflow run."""
    model: str
    version: int
    """In the registry, under `model`."""
    best_step: int
    best_epoch: float
    metrics: dict[str, float]
    """On the test split: `kept/ndcg_at_10`, `masked/hr_at_5`, ..."""
    speed: dict[str, float]
    """Of the last stretch without a restart: seconds an epoch, targets/s, and the share of time
    that workers waited for data."""
    baselines: dict[str, dict[str, float]]
    """The same of popularity and repeat_recent."""
    pictures: dict[str, str]
    """URI of each picture."""


def conclude(
    run: RunConfig,
    manifest: Manifest,
    folder: RunFolder,
    tracking_uri: str,
    run_id: str,
    best: Checkpoint,
    speed: dict[str, float],
    say: Callable[[str], None],
) -> Outcome:
    """Ranks the test split with the best checkpoint, shows it, and registers the model.

    Raises:
        CheckpointError: If the checkpoint is torn.
        SchemaError: If the store is torn.
        TrackingError: If MLflow cannot be reached or refuses.
    """
    progress = json.loads(_text(best, "progress.json"))
    with model_files(best.filesystem, best.path, best.path) as files:
        method, catalog = load_model(files, manifest.num_items)
    result = evaluate_model(method, catalog.max_len, run.data.store_uri, "test", run.evaluation)
    say("")
    if speed:
        say(
            f"{speed['epoch_s']:.1f} s an epoch, {speed['targets_per_s']:,.0f} targets/s, "
            f"{100 * speed['wait_share']:.1f}% of the time waiting for data"
        )
    if speed.get("wait_share", 0.0) > run.data.wait_warning_share:
        say(
            f"warning: that is over data.wait_warning_share={run.data.wait_warning_share:g}; raise "
            "data.read_tasks or data.prefetch_batches, or give reading more CPUs"
        )
    say(f"best checkpoint: epoch {progress['epoch']:.2f}, step {progress['step']}")
    say(report.main_table(result))
    say("")
    say(report.length_table(result))

    pictures = {
        "curves.png": picture(curves(tracking_uri, run_id), run.name),
        "by-length.png": report.picture(result),
    }
    _keep(result, pictures, folder)
    _log(result, pictures, tracking_uri, run_id, progress["step"])

    items = read_item_ids(run.data.store_uri, manifest)
    made = Artifact(method, run.method, catalog, items)
    version = _registered(run, manifest, made, result, tracking_uri, run_id)
    say("")
    for name in pictures:
        say(f"picture: {folder.at(name)}")
    say(f"registered {run.registered_model} version {version.number}")
    return Outcome(
        name=run.name,
        run_id=run_id,
        model=run.registered_model,
        version=version.number,
        best_step=progress["step"],
        best_epoch=progress["epoch"],
        metrics=result.metrics,
        speed=speed,
        baselines=_baselines(result),
        pictures={name: folder.at(name) for name in pictures},
    )


def _registered(
    run: RunConfig,
    manifest: Manifest,
    artifact: Artifact,
    result: EvaluationResult,
    tracking_uri: str,
    run_id: str,
) -> Version:
    """The run's version in the registry: the one it has, where it was cut off after making it."""
    registry = Registry(tracking_uri)
    tags = {
        "store_manifest": manifest_hash(manifest),
        "method": run.method.name,
        "run": run.name,
        **{f"test.{name}": f"{value:.6f}" for name, value in result.metrics.items()},
    }
    before = registry.made_by(run.registered_model, run_id, tags)
    if before is not None:
        return before
    with tempfile.TemporaryDirectory(prefix="distrl-model-") as temporary:
        folder = Path(temporary, "model")
        write_artifact(folder, artifact)
        model_uri = log_model(tracking_uri, run_id, folder, manifest.item_type)
    return registry.register(run.registered_model, model_uri, run_id, tags)


def _text(checkpoint: Checkpoint, name: str) -> str:
    fs = checkpoint.filesystem
    assert fs is not None, "a checkpoint that Ray hands out knows its file system"
    with fs.open_input_stream(f"{checkpoint.path}/{name}") as file:
        return file.read().decode()


def _baselines(result: EvaluationResult) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, ranks in result.ranks.items():
        ranker, _, policy = name.partition("/")
        if ranker != "model":
            metrics = ranks.metrics(result.cutoffs)
            found.setdefault(ranker, {}).update(
                {f"{policy}/{metric}": value for metric, value in metrics.items()}
            )
    return found


def _keep(result: EvaluationResult, pictures: dict[str, bytes], folder: RunFolder) -> None:
    """The tables and pictures beside the run."""
    folder.write("test.json", json.dumps(report.as_json(result), indent=1))
    folder.write("test.csv", report.as_csv(result))
    for name, image in pictures.items():
        write_bytes(folder.at(name), image)


def _log(
    result: EvaluationResult,
    pictures: dict[str, bytes],
    tracking_uri: str,
    run_id: str,
    step: int,
) -> None:
    """The tables and pictures in MLflow."""
    log = RunLog(tracking_uri, run_id)
    log.log_metrics(step, {f"test/{name}": value for name, value in result.metrics.items()})
    log.log_text("test.csv", report.as_csv(result))
    log.log_text("test.txt", f"{report.main_table(result)}\n\n{report.length_table(result)}\n")
    for name, image in pictures.items():
        log.log_bytes(name, image)
    log.close(FLUSH_S)
