"""Models with known rankings, logged and registered, for tests of what serves and judges them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch

from distrl.contract import Catalog
from distrl.methods import build
from distrl.methods.sasrec import SASRec, SASRecConfig
from distrl.serving.artifact import Artifact, write_artifact
from distrl.tracking.connection import check_reachable
from distrl.tracking.model import log_model
from distrl.tracking.registry import Registry, Version
from distrl.tracking.runs import create_run

SETTINGS = SASRecConfig(hidden_size=8, inner_size=16)


def random_model(items: Sequence[str] | Sequence[int], max_len: int = 10) -> Artifact:
    """An untrained model with larger weights, so that its scores spread."""
    catalog = Catalog(len(items), max_len)
    method = build(SETTINGS, catalog)
    with torch.no_grad():
        for weights in method.parameters():
            weights.mul_(10.0)
    return Artifact(method, SETTINGS, catalog, pa.array(items))


def fixed_ranking(items: Sequence[str], best_first: Sequence[str]) -> Artifact:
    """A model that ranks these items in this order for every user, and all others behind them."""
    artifact = random_model(items)
    assert isinstance(artifact.method, SASRec)
    encoder = artifact.method.encoder
    with torch.no_grad():
        last = encoder.layers[-1].inner_norm
        last.weight.zero_()
        last.bias.zero_()
        last.bias[0] = 1.0  # every state is the first unit vector
        encoder.item_table.weight.zero_()
        for place, item in enumerate(best_first):
            encoder.item_table.weight[1 + list(items).index(item), 0] = float(len(items) - place)
    return artifact


def registered(
    uri: str,
    artifacts: str | None,
    model: str,
    artifact: Artifact,
    folder: Path,
    tags: Mapping[str, str] | None = None,
) -> Version:
    """A new version of a registered model, logged with a run of its own."""
    check_reachable(uri)
    run_id = create_run(uri, "distrl", model, {}, artifacts=artifacts)
    write_artifact(folder, artifact)
    item_type = "string" if pa.types.is_string(artifact.items.type) else "int64"
    model_uri = log_model(uri, run_id, folder, item_type)
    return Registry(uri).register(model, model_uri, run_id, tags or {})
