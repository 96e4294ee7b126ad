import torch
from torch import nn

from distrl.engine.graph import reach


def test_a_parameter_that_the_loss_does_not_reach_gets_a_gradient_of_zero():
    used, unused = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.ones(2, 2))
    total = reach((used**2).sum(), [used, unused])
    total.backward()
    assert total.item() == 13.0
    assert used.grad is not None
    assert unused.grad is not None
    assert used.grad.tolist() == [4.0, 6.0]
    assert unused.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_loss_that_reaches_every_parameter_stays_as_it_is():
    table = nn.Parameter(torch.ones(3))
    total = table[1:].sum() + table.exp().sum()
    assert reach(total, [table]) is total


def test_a_loss_without_any_gradient_still_has_a_backward():
    table = nn.Parameter(torch.ones(3))
    reach(torch.zeros(()), [table]).backward()
    assert table.grad is not None
    assert table.grad.tolist() == [0.0, 0.0, 0.0]
