import json
import math

import pytest
import torch

from distrl.engine.collectives import ensure_process_group
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.ops.diagnostics import view_diagnostics
from distrl.train.collapse import CollapseProbe, diagnostics
from tests.parity.engine_methods import cut, empty, make, shares_of
from tests.ranks import run_ranks

NAMES = {
    f"views/{kind}/{name}"
    for kind in ("data", "learned")
    for name in ("alignment", "uniformity", "effective_rank", "norm")
}


def train(*, measured, name="mclrec", steps=3, zero_stage=1):
    """Steps with dropout, drawn as they come; the weights, the draws that follow, the figures."""
    ensure_process_group("gloo")
    method = make(name, dropout=0.5, attention_dropout=0.5)
    engines = Engines(
        method,
        EngineConfig(zero_stage=zero_stage, lr=1e-2),
        device=torch.device("cpu"),
        micro_batch_size=7,
        num_workers=1,
    )
    probe, found = CollapseProbe(method, engines), []
    torch.manual_seed(1)
    for batch, step in probe.watched((cut(step, 0, 7), step) for step in range(steps)):
        for phase in method.phases(0):
            engines.step(batch, phase, shares_of([batch])[0], step=step)
            if measured:
                found.append(probe.read())
                assert method.training
    with engines.gathered():
        weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    return weights, torch.rand(4), found


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_measuring_after_every_phase_changes_no_bit_of_training(zero_stage):
    plain, draws, _ = train(measured=False, zero_stage=zero_stage)
    looked_at, draws_after, found = train(measured=True, zero_stage=zero_stage)
    for name, value in plain.items():
        assert torch.equal(value, looked_at[name]), name
    assert torch.equal(draws, draws_after)
    assert set(found[-1]) == NAMES
    assert found[-1] != found[0]


def test_the_figures_are_those_of_the_held_batch_in_evaluation_mode():
    weights, _, found = train(measured=True)
    method = make("mclrec").eval()
    method.load_state_dict(weights, strict=False)
    with torch.no_grad():
        states = method.view_states(cut(0, 0, 7))
    for kind, (first, second) in states.items():
        for name, value in view_diagnostics(first, second).items():
            assert found[-1][f"views/{kind}/{name}"] == pytest.approx(value, rel=1e-5)


def test_the_first_batch_of_those_with_most_pairs_is_held():
    method = make("mclrec")
    probe = CollapseProbe(method, None)
    batches = [empty(), cut(0, 0, 3), cut(1, 0, 7), cut(2, 0, 7), cut(3, 0, 2)]
    assert len(list(probe.watched((batch, None) for batch in batches))) == 5
    assert probe._batch is batches[2]


def test_a_method_without_views_has_no_figures():
    *_, found = train(measured=True, name="sasrec")
    assert found[-1] == {}
    *_, found = train(measured=True, name="cl4srec")
    assert {name.split("/")[1] for name in found[-1]} == {"data"}


def test_pairs_of_all_workers_are_measured_together():
    first, second = torch.randn(9, 4), torch.randn(9, 4)
    parts = [{"data": (first[:4], second[:4])}, {}, {"data": (first[4:], second[4:])}]
    whole = {f"views/data/{name}": v for name, v in view_diagnostics(first, second).items()}
    assert diagnostics(parts) == pytest.approx(whole, rel=1e-12)
    assert diagnostics([{}, {}]) == {}


def test_views_that_are_not_finite_are_left_to_the_loss_to_tell():
    views = torch.randn(4, 3)
    broken = views.clone()
    broken[0, 0] = math.nan
    found = diagnostics([{"data": (views, views), "learned": (views, broken)}])
    assert {name.split("/")[1] for name in found} == {"data"}


@pytest.mark.slow
def test_ranks_without_pairs_at_zero_3_neither_hang_nor_differ(tmp_path):
    run_ranks(2, "tests.unit.train.collapse_ranks", tmp_path, timeout_s=120)
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert first == second
    assert first["nobody"] == {}
    assert set(first["spread"]) == set(first["alone"]) == NAMES
    method = make("mclrec").eval()
    method.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=False)
    with torch.no_grad():
        states = method.view_states(cut(0, 0, 7))
    for kind, views in states.items():
        for name, value in view_diagnostics(*views).items():
            assert first["alone"][f"views/{kind}/{name}"] == pytest.approx(value, rel=1e-5)
