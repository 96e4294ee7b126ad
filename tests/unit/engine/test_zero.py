"""What needs no DeepSpeed; the engines at work are in parity/test_engine."""

import pytest
from torch import nn

from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.errors import ConfigError
from tests.parity.engine_methods import CPU, Tiny


def wrap(method, **settings):
    return Engines(method, EngineConfig(**settings), device=CPU, micro_batch_size=2, num_workers=1)


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
