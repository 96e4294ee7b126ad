"""The task that Ray Train runs beside training for a checkpoint."""

from functools import partial
from typing import Any

import ray
from ray.train import Checkpoint

from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.store import read_manifest
from distrl.train.causes import in_a_line
from distrl.train.evaluate import evaluate_model
from distrl.train.saved import load_model, model_files
from distrl.waiting import once_there

ALWAYS_CUTOFF = 10
"""The best checkpoint is chosen by NDCG@10, whatever cutoffs are configured."""


def validate(
    checkpoint: Checkpoint,
    *,
    store_uri: str,
    config: EvaluationConfig,
    step: int,
    epoch: float,
    monitor: Any = None,  # noqa: ANN401
) -> dict[str, float]:
    """Ranks the validation split with a checkpoint's weights, off the training path.

    Args:
        checkpoint: As training reported it; optimizer states are not downloaded.
        store_uri: The store that is trained on.
        config: How to rank.
        step: Global step of the checkpoint.
        epoch: Passes over the store so far.
        monitor: Handle of the run's monitor, which is told the metrics; None tells nobody.

    Returns:
        `val/hr_at_5`, `val/ndcg_at_10`, ... with seen items kept, `val/masked/...` with seen items
        masked, and `val/num_users`.

    Raises:
        CheckpointError: If the checkpoint is torn.
        SchemaError: If the store is torn.
        StorageError: If the checkpoint or the store is away for long.
    """

    def say(line: str) -> None:
        if monitor is not None:
            monitor.tell.remote(line)

    # Ray Train never asks again for a validation that failed: an outage is outlasted here.
    outlast = partial(once_there, say=say, line=in_a_line)
    try:
        metrics = outlast(lambda: _ranked(checkpoint, store_uri, config))
        if monitor is not None:
            outlast(lambda: ray.get(monitor.validated.remote(step, epoch, metrics)))
    except Exception as error:
        # Ray Train only logs it, and training would go on to an end without a best checkpoint.
        say(f"warning: validating step {step} failed: {in_a_line(error)}")
        raise
    return metrics


def _ranked(checkpoint: Checkpoint, store_uri: str, config: EvaluationConfig) -> dict[str, float]:
    cutoffs = tuple(sorted({*config.cutoffs, ALWAYS_CUTOFF}))
    config = config.model_copy(update={"cutoffs": cutoffs})
    num_items = read_manifest(store_uri).num_items
    with model_files(checkpoint.filesystem, checkpoint.path, checkpoint.path) as folder:
        method, catalog = load_model(folder, num_items)
    result = evaluate_model(
        method, catalog.max_len, store_uri, "validation", config, baselines=False
    )
    metrics = {f"val/{name.removeprefix('kept/')}": value for name, value in result.metrics.items()}
    return {**metrics, "val/num_users": float(result.num_users)}
