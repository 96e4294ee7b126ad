"""What a worker says of its losses, and how it ends."""

from types import SimpleNamespace

import pytest

from distrl.errors import CheckpointError, DivergedError, SchemaError, StorageError
from distrl.train import worker
from distrl.train.worker import _totals, train_worker


@pytest.mark.parametrize(
    ("means", "loss"),
    [
        ({"encoder/total": 9.0, "encoder/next_item": 8.0, "augmenters/total": 3.0}, 8.0),
        ({"augmenter/operation": 1.0, "augmenter/total": 7.5}, 7.5),
    ],
)
def test_the_progress_line_has_the_next_item_loss_or_a_stages_own(means, loss):
    assert _totals(means) == {"loss": loss}


def test_nothing_trained_has_no_loss():
    assert _totals({"views/data/alignment": 0.1}) == {}


class Fails:
    """A worker whose making, or whose training, ends so."""

    def __init__(self, error, *, at_once):
        self.error, self.state = error, SimpleNamespace(step=7)
        if at_once:
            raise error

    def train(self):
        raise self.error


@pytest.mark.parametrize(("at_once", "steps"), [(True, 0), (False, 7)])
def test_what_no_second_try_would_mend_is_an_answer_and_what_one_may_is_raised(
    monkeypatch, at_once, steps
):
    def ends(error):
        monkeypatch.setattr(worker, "_Worker", lambda task: Fails(error, at_once=at_once))
        return train_worker({"task": None})

    for error in (CheckpointError("torn"), SchemaError("torn"), DivergedError("not finite")):
        assert ends(error) == {"steps": steps, "error": error}
    for error in (StorageError("away"), ValueError("a bug")):
        with pytest.raises(type(error)):
            ends(error)
