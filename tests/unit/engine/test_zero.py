"""What needs no DeepSpeed; the engines at work are in parity/test_engine."""

import pytest
import torch
from torch import nn

from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines, _reach
from distrl.errors import ConfigError
from tests.parity.engine_methods import CPU, Tiny


def wrap(method, **settings):
    return Engines(method, EngineConfig(**settings), device=CPU, micro_batch_size=2, num_workers=1)


def test_a_parameter_that_the_loss_does_not_reach_gets_a_gradient_of_zero():
    used, unused = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.ones(2, 2))
    total = _reach((used**2).sum(), [used, unused])
    total.backward()
    assert total.item() == 13.0
    assert used.grad is not None
    assert unused.grad is not None
    assert used.grad.tolist() == [4.0, 6.0]
    assert unused.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_loss_that_reaches_every_parameter_stays_as_it_is():
    table = nn.Parameter(torch.ones(3))
    total = table[1:].sum() + table.exp().sum()
    assert _reach(total, [table]) is total


def test_a_loss_without_any_gradient_still_has_a_backward():
    table = nn.Parameter(torch.ones(3))
    _reach(torch.zeros(()), [table]).backward()
    assert table.grad is not None
    assert table.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_learning_rate_for_a_part_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match=r"names augmenters; .* are encoder, head"):
        wrap(Tiny(), lr_of={"augmenters": 1e-4})


class Orphan(Tiny):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2, bias=False)


class Shared(Tiny):
    @property
    def parts(self):
        return {"encoder": self.encoder, "table": self.encoder["table"], "head": self.head}


def test_a_parameter_in_no_part_is_named():
    with pytest.raises(ValueError, match=r"extra\.weight is in no part"):
        wrap(Orphan())


def test_a_parameter_in_two_parts_is_named():
    with pytest.raises(ValueError, match=r"encoder\.table\.weight is in parts encoder, table"):
        wrap(Shared())
