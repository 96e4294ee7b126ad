"""Evaluation under noise: what it touches, and what it does not depend on."""

import pytest
import torch

from distrl.contract import Catalog
from distrl.data.evaluation_config import EvaluationConfig
from distrl.methods import build, parse_method
from distrl.train.evaluate import evaluate_local
from tests.store_factory import make_store

SEQUENCES = [[1 + (u + i * (1 + u % 3)) % 40 for i in range(5 + u % 9)] for u in range(120)]


def ranks(folder, split, num_shards=2, **settings):
    if not folder.exists():
        make_store(folder, SEQUENCES, num_shards=num_shards, num_items=40)
    torch.manual_seed(3)
    config = parse_method({"name": "sasrec", "hidden_size": 8, "inner_size": 16})
    method = build(config, Catalog(40, 6))
    with torch.no_grad():
        for weights in method.parameters():
            weights.mul_(10.0)
    found = evaluate_local(method, 6, str(folder), split, EvaluationConfig(**settings))
    return {name: counts.counts.tolist() for name, counts in found.ranks.items()}


def test_noise_moves_the_models_test_ranks_alone(tmp_path):
    clean, noisy = (ranks(tmp_path / "s", "test", noise_share=share) for share in (0.0, 0.5))
    assert noisy["model/kept"] != clean["model/kept"]
    for name in clean:
        if not name.startswith("model"):
            assert noisy[name] == clean[name], name
    clean, noisy = (ranks(tmp_path / "s", "validation", noise_share=share) for share in (0.0, 0.5))
    assert noisy == clean


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_ranks_under_noise_depend_on_no_batch_and_no_shard(tmp_path, share):
    whole = ranks(tmp_path / "a", "test", noise_share=share)
    assert ranks(tmp_path / "a", "test", noise_share=share, batch_size=7) == whole
    assert ranks(tmp_path / "b", "test", num_shards=5, noise_share=share) == whole


def test_another_seed_is_other_noise(tmp_path):
    first, second = (
        ranks(tmp_path / "s", "test", noise_share=0.3, noise_seed=seed) for seed in (0, 1)
    )
    assert first["model/kept"] != second["model/kept"]
