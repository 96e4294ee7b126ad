"""The sample synthesizer, by hand."""

import math

import pytest
import torch

from distrl.nn.synthesizer import Synthesizer

TEXT = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
NEIGHBORS = torch.tensor([[1.0, 1.0], [0.0, 1.0], [-2.0, 0.0]])


def leaky(value):
    return value if value > 0 else 0.2 * value


def made(score="gat", dropout=0.5):
    torch.manual_seed(0)
    layer = Synthesizer(text_size=2, hidden_size=2, score=score, dropout=dropout)
    with torch.no_grad():
        if score == "gat":
            layer.project.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
            layer.attend.weight.copy_(torch.tensor([[1.0, -1.0, 0.5, 1.0]]))
        else:
            layer.project.weight.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
            layer.attend.weight.copy_(torch.tensor([[1.0, 2.0]]))
    return layer.eval()


def test_gat_scores_are_those_worked_by_hand():
    # W q of the first prefix is (1, 0), of the second (4, 2); a1 . Wq is 1 and 2.
    # W c of the neighbors is (3, 1), (2, 1), (-2, 0); a2 . Wc is 2.5, 2 and -1.
    weights = made()(TEXT, NEIGHBORS, torch.tensor([[0, 2], [2, 1]]))
    scores = [[leaky(3.5), leaky(0.0)], [leaky(1.0), leaky(4.0)]]
    for row, pair in zip(weights.tolist(), scores, strict=True):
        total = sum(math.exp(score) for score in pair)
        assert row == pytest.approx([math.exp(score) / total for score in pair], rel=1e-6)


def test_gatv2_lets_the_prefix_turn_the_order():
    # Hidden sums are q + (c_x, -c_y) before the LeakyReLU.
    weights = made("gatv2")(TEXT, NEIGHBORS, torch.tensor([[0, 1], [0, 1]]))

    def score(q, c):
        return leaky(q[0] + c[0]) + 2 * leaky(q[1] - c[1])

    for row, q in zip(weights.tolist(), TEXT.tolist(), strict=True):
        pair = [score(q, NEIGHBORS[i].tolist()) for i in (0, 1)]
        total = sum(math.exp(value) for value in pair)
        assert row == pytest.approx([math.exp(value) / total for value in pair], rel=1e-6)


@pytest.mark.parametrize("score", ["gat", "gatv2"])
def test_weights_sum_to_one_over_the_neighbors_that_are_there(score):
    weights = made(score)(TEXT, NEIGHBORS, torch.tensor([[1, -1, -1], [-1, -1, -1]]))
    assert weights.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    full = made(score)(TEXT, NEIGHBORS, torch.tensor([[0, 1, 2], [2, 1, -1]]))
    assert full.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_dropout_falls_on_the_weights_and_keeps_their_mean():
    layer = made().train()
    torch.manual_seed(0)
    sums = torch.stack(
        [layer(TEXT, NEIGHBORS, torch.tensor([[0], [1]])) for _ in range(2000)]
    ).detach()
    assert set(sums.unique().tolist()) == {0.0, 2.0}
    assert sums.mean().item() == pytest.approx(1.0, abs=0.06)


def test_a_prefix_without_neighbors_sends_no_nan_backward():
    layer = made().train()
    layer(TEXT, NEIGHBORS, torch.tensor([[0, 1], [-1, -1]])).square().sum().backward()
    assert torch.isfinite(layer.project.weight.grad).all()
    assert torch.isfinite(layer.attend.weight.grad).all()
