"""What the driver does around Ray Train, without a cluster."""

import signal
from types import SimpleNamespace

import pytest
from ray.train import ControllerError

from distrl import launch
from distrl.errors import CheckpointError
from distrl.train.monitor import SELECT_BY


@pytest.mark.parametrize(
    ("ends", "raised"),
    [(ControllerError(OSError("away")), ControllerError), (SystemExit(0), KeyboardInterrupt)],
)
def test_ctrl_c_is_pythons_between_two_attempts(ends, raised):
    class Trainer:
        def fit(self):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise ends

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(raised):
        launch._attempt(Trainer())
    assert signal.getsignal(signal.SIGINT) is before


def test_the_best_checkpoint_is_one_that_was_validated():
    known = [("first", {SELECT_BY: 0.1}), ("best", {SELECT_BY: 0.3}), ("newest", {"step": 9})]
    assert launch._best(SimpleNamespace(best_checkpoints=known), None) == "best"


@pytest.mark.parametrize("known", [None, [], [("newest", {"step": 9})]])
def test_a_run_without_a_validation_says_so_in_a_line(known):
    folder = SimpleNamespace(uri="s3://runs/mine")
    with pytest.raises(CheckpointError, match="no checkpoint of s3://runs/mine is validated"):
        launch._best(SimpleNamespace(best_checkpoints=known), folder)
