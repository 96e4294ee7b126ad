"""A validation whose storage is away, without Ray."""

from types import SimpleNamespace

import pytest
import ray

from distrl import waiting
from distrl.data.evaluation_config import EvaluationConfig
from distrl.errors import CheckpointError, StorageError
from distrl.train import validate as module

METRICS = {"val/ndcg_at_10": 0.5}


class Monitor:
    """Keeps what it is told; `fails` are raised by `validated`, one a call."""

    def __init__(self, fails=()):
        self.said, self.known, self.fails = [], [], list(fails)
        self.tell = SimpleNamespace(remote=self.said.append)
        self.validated = SimpleNamespace(remote=self._validated)

    def _validated(self, *told):
        if self.fails:
            raise self.fails.pop(0)
        self.known.append(told)


@pytest.fixture
def ranked(monkeypatch):
    """What ranking raises, one a call, and how often it was called."""
    state, now = {"fails": [], "calls": 0}, [0.0]

    def rank(*_):
        state["calls"] += 1
        if state["fails"]:
            raise state["fails"].pop(0)
        return METRICS

    monkeypatch.setattr(module, "_ranked", rank)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return state


def validated(monitor):
    return module.validate(
        None, store_uri="s", config=EvaluationConfig(), step=7, epoch=1.0, monitor=monitor
    )


def test_an_outage_costs_no_validation_and_no_second_ranking(ranked):
    ranked["fails"] = [StorageError("cannot read the store")] * 2
    monitor = Monitor([StorageError("cannot write validations.json")])
    assert validated(monitor) == METRICS
    assert monitor.known == [(7, 1.0, METRICS)]
    assert ranked["calls"] == 3
    assert monitor.said == [
        "warning: cannot read the store; asking again in 2 s",
        "warning: cannot read the store; asking again in 4 s",
        "warning: cannot write validations.json; asking again in 2 s",
    ]


def test_what_stays_away_or_is_torn_fails_with_a_line(ranked):
    ranked["fails"] = [StorageError("cannot read the store")] * 1000
    monitor = Monitor()
    with pytest.raises(StorageError):
        validated(monitor)
    assert monitor.said[-1] == "warning: validating step 7 failed: cannot read the store"
    ranked["fails"] = [CheckpointError("model.safetensors is torn")]
    monitor = Monitor()
    with pytest.raises(CheckpointError):
        validated(monitor)
    assert monitor.said == ["warning: validating step 7 failed: model.safetensors is torn"]
