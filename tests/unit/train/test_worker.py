"""What a worker says of its losses."""

import pytest

from distrl.train.worker import _totals


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
