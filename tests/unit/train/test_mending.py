"""What a method is judged on after each epoch."""

import pytest
import torch

from distrl.config import RunConfig
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash
from distrl.engine.collectives import ensure_process_group
from distrl.train.mending import MendingProbe
from distrl.train.state import TrainingState
from tests.store_factory import make_store

SEQUENCES = [[1 + (u + i) % 12 for i in range(4 + u % 5)] for u in range(40)]


@pytest.mark.parametrize(("crop_ratio", "share"), [(0.0, 1.0), (0.9, 0.0)])
def test_held_out_views_are_drawn_by_the_runs_own_settings(tmp_path, crop_ratio, share):
    manifest = make_store(tmp_path / "store", SEQUENCES, num_items=12)
    augment = {"operations": ["crop"], "distinct": False, "crop_ratio": crop_ratio}
    data = {"store_uri": str(tmp_path / "store"), "batch_size": 8, "max_len": 6}
    method = {"name": "laclrec", "hidden_size": 8, "inner_size": 16, "pretrain_epochs": 1}
    settings = {"data": {**data, "augment": augment}, "method": method}
    run = RunConfig.model_validate({"name": "r", "training": {"epochs": 2}, **settings})
    ensure_process_group("gloo")
    state = TrainingState(run, manifest, manifest_hash(manifest), torch.device("cpu"))
    maker = BatchMaker.of(run.data, state.method, manifest.num_items, run.seed)
    figures = MendingProbe(state, manifest, maker).judge(0)
    assert figures["augmenter/random_unchanged_share"] == share
