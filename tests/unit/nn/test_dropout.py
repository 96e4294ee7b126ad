"""Dropout drawn 16 bits at a time: the right share, the right scale, from torch's generator."""

import pytest
import torch

from distrl.nn.dropout import Dropout, drop, keep_mask


@pytest.mark.parametrize("dropped", [0.1, 0.5, 0.9])
def test_the_share_that_stays_is_the_share_asked_for(dropped):
    torch.manual_seed(0)
    size = 400_000
    kept = keep_mask(torch.Size([size]), dropped).double().mean().item()
    deviation = (dropped * (1 - dropped) / size) ** 0.5
    assert kept == pytest.approx(1 - dropped, abs=5 * deviation + 2**-16)


def test_elements_are_drawn_apart_from_their_neighbors():
    torch.manual_seed(0)
    mask = keep_mask(torch.Size([4, 100_000]), 0.5).double() - 0.5
    for apart in range(1, 9):
        flat = mask.flatten()
        assert abs((flat[apart:] * flat[:-apart]).mean().item()) < 5 * 0.25 / 400_000**0.5


@pytest.mark.parametrize("shape", [(3,), (1, 1), (5, 7), (2, 3, 5)])
def test_sizes_that_fill_no_whole_word_are_served(shape):
    assert keep_mask(torch.Size(shape), 0.5).shape == shape


def test_what_stays_is_scaled_so_that_means_stay():
    torch.manual_seed(0)
    values = torch.ones(200_000, dtype=torch.float64)
    for dropped in (0.1, 0.5):
        found = drop(values, dropped, training=True)
        assert len(found.unique()) == 2
        assert found.max().item() == pytest.approx(1 / (1 - dropped), rel=1e-4)
        assert found.mean().item() == pytest.approx(1.0, abs=0.02)


def test_gradients_pass_where_values_do():
    torch.manual_seed(0)
    values = torch.randn(64, 9, requires_grad=True)
    found = drop(values, 0.5, training=True)
    found.sum().backward()
    assert torch.equal(values.grad, torch.where(found != 0, 2.0, 0.0))


def test_the_same_seed_draws_the_same_and_bfloat16_stays_bfloat16():
    values = torch.ones(1000, dtype=torch.bfloat16)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(drop(values, 0.5, training=True))
    assert draws[0].dtype == torch.bfloat16
    assert torch.equal(*draws)


def test_evaluation_and_a_share_of_nothing_draw_nothing():
    values = torch.randn(10)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0)(values) is values
    assert torch.equal(torch.get_rng_state(), state)
