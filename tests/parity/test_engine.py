"""Engines against plain torch, on one and two ranks, and checkpoints between worlds and stages.

The two process groups run every case once (`engine_cases`); the tests read what they found.
"""

import json

import pytest

from tests.ranks import run_ranks

WORLDS, STAGES = (1, 2), (1, 2, 3)
TOLERANCE = 1e-6
"""Of float32 weights, relative to the largest. Most cases are at 0.0 on torch 2.13 and gloo."""
BF16_TOLERANCE = 1e-6
"""The same: masters, optimizer state and the mean over ranks are float32 on both sides."""

pytestmark = pytest.mark.slow


def launch(world, *arguments):
    """Runs the cases in `world` processes; without a PATH nothing can call a compiler."""
    environment = {"PATH": "/nonexistent"}
    return run_ranks(world, "tests.parity.engine_cases", *arguments, environment=environment)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results by world size; 2 has also read what 1 saved, and "back" is 1 that read what 2 did."""
    out = {name: tmp_path_factory.mktemp(f"world-{name}") for name in (1, 2, "back")}
    said = {1: launch(1, "all", out[1]), 2: launch(2, "all", out[2], out[1])}
    said["back"] = launch(1, "resume", out["back"], out[2])
    results = {name: json.loads((path / "results.json").read_text()) for name, path in out.items()}
    for name, lines in said.items():
        results[name]["said"] = lines
    return results


def assert_close(figures, tolerance=TOLERANCE):
    assert figures["diff"] <= tolerance * max(figures["scale"], 1.0), figures


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "case",
    [
        *("mclrec-3", "mclrec-2", "mclrec-joint", "second-order"),
        *("sracl-mclrec", "sracl-gru4rec"),
        *("laclrec-two", "laclrec-joint"),
        *("tiny", "dropout", "clipped", "momentum", "adam"),
    ],
)
def test_every_phase_moves_weights_as_plain_torch_does(found, world, stage, case):
    figures = found[world][f"{case}-z{stage}"]
    assert_close(figures)
    assert figures["moved"] > 1e-3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["bf16", "bf16-clipped", "bf16-adam"])
def test_bf16_is_bf16_torch_with_float32_masters(found, world, stage, case):
    figures = found[world][f"{case}-z{stage}"]
    assert_close(figures, BF16_TOLERANCE)
    assert figures["moved"] > 1e-3


@pytest.mark.parametrize("world", WORLDS)
def test_clipping_changes_the_step(found, world):
    results = found[world]
    assert results["clipped-z1"]["moved"] < 0.5 * results["mclrec-3-z1"]["moved"]


@pytest.mark.parametrize("stage", STAGES)
def test_unequal_batches_on_two_ranks_equal_all_rows_in_one(found, stage):
    assert_close(found[2][f"union-z{stage}"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "method",
    [*("mclrec", "mclrec-joint", "cl4srec", "sracl"), *("laclrec-two", "laclrec-joint")],
)
def test_negatives_of_all_workers_make_the_loss_of_one_worker_with_all_pairs(
    found, world, stage, method
):
    assert_close(found[world][f"all-workers-{method}-z{stage}"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_phase_moves_the_parts_it_names_and_no_bit_of_the_others(found, world, stage):
    batch = [
        ["encoder", ["encoder"]],
        ["augmenters", ["augmenters"]],
        ["encoder_again", ["encoder"]],
    ]
    assert found[world][f"moved-z{stage}"] == batch + batch


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_masters_are_sharded_and_at_stage_3_parameters_too(found, world, stage):
    weights = (13 * 8) + (8 * 8 + 8) + (8 * 4 + 4) + (4 * 8 + 8)
    visible = 0 if stage == 3 else weights
    assert found[world][f"kept-z{stage}"] == [visible, weights // world]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(found, world, stage, precision):
    result = found[world][f"loss-{precision}-z{stage}"]
    assert result["still"] == [True] * world
    assert len(set(result["said"])) == 1
    message = result["said"][0]
    assert message.startswith("phase encoder, step 41: the loss is not finite")
    assert f"rank {world - 1}: learned=0, next_item=inf, total=inf" in message


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_stops_all(found, world, stage, precision):
    result = found[world][f"gradient-{precision}-z{stage}"]
    assert result["still"] == [True] * world
    for message in result["said"]:
        assert message.startswith("phase encoder, step 41: the gradient of encoder is not finite")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_going_on_from_a_checkpoint_changes_no_bit(found, world, stage, precision):
    result = found[world][f"interrupted-{precision}-z{stage}"]
    assert result["same"] == [[True] * world] * 2
    # Tiny has 7 weights and a buffer; Adam keeps two moments a weight and a step a part.
    assert result["compared"] == 8 + 2 * 7 + 2


@pytest.mark.parametrize("world", WORLDS)
def test_momentum_is_kept_too(found, world):
    result = found[world]["interrupted-sgd"]
    assert result == {"same": [[True] * world] * 2, "compared": 8 + 7 + 2}


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_from_before_the_first_step_is_a_fresh_start(found, world):
    assert found[world]["unstepped"] is True


@pytest.mark.parametrize("reader", [2, "back"])
@pytest.mark.parametrize("stages", ["1-3", "3-1", "2-2"])
def test_adam_goes_on_as_uninterrupted_at_another_world_size_and_stage(found, reader, stages):
    assert_close(found[reader][f"changed-{stages}"])


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_torn_on_one_rank_is_refused_by_all(found, world):
    result = found[world]["refused"]["torn"]
    assert result["still"] == [True] * world
    for message in result["said"]:
        assert "optimizer-head.safetensors is torn" in message


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_another_optimizer_or_method_is_named(found, world):
    refused = found[world]["refused"]
    for message in refused["optimizer"]["said"]:
        assert message.endswith("optimizer is 'adam', expected 'sgd'")
    for message in refused["method"]["said"]:
        assert message.endswith("model.safetensors has no tensor encoder.item_table.weight")


def test_ranks_that_drew_different_weights_start_from_rank_0s(found):
    assert found[2]["from-rank-0"] == [[0.0, 0.0]] * 2


def test_small_collectives_on_two_ranks(found):
    assert found[2]["collectives"] == {
        "sum": [2.0, 1.0, 2.0**54],
        "gathered": [{"rank": 0}, {"rank": 1}],
        "broadcast": ["from 0", "from 0"],
    }


@pytest.mark.parametrize("world", WORLDS)
def test_what_one_rank_cannot_do_fails_on_all(found, world):
    assert found[world]["together"] == [[f"rank {world - 1} sees no table", "read"]] * world


def test_deepspeed_says_nothing_but_that_it_skipped_the_poisoned_steps(found):
    lines = [line for world in found.values() for line in world["said"].splitlines()]
    assert [line for line in lines if "OVERFLOW! Skipping step" not in line] == []
