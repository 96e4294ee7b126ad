from types import SimpleNamespace

from distrl.study.tuning import Tell
from distrl.train.monitor import SELECT_BY

OURS = SimpleNamespace(
    name="000-seed0",
    label="full",
    run=SimpleNamespace(training=SimpleNamespace(epochs=10)),
)


def told(*results):
    """What is said of one trial's results, each (epoch, seconds since the one before, number)."""
    lines = []
    tell = Tell(lines.append, {OURS.name: OURS})
    for epoch, seconds, iteration in results:
        result = {
            "epoch": epoch,
            "time_this_iter_s": seconds,
            "training_iteration": iteration,
            SELECT_BY: 0.05,
            "targets_per_s": 1000.0,
        }
        trial = SimpleNamespace(config={"trial": OURS.name})
        tell.on_trial_result(iteration, [], trial, result)
    return lines


def test_a_validation_says_how_long_the_trial_takes_yet():
    first, second, last = told((2, 30.0, 1), (4, 20.0, 2), (10, 60.0, 5))
    assert first == (
        "000-seed0 (full)  epoch 2/10  validation NDCG@10 0.0500  1,000 targets/s  "
        "at most 120 s left"
    )
    assert second.endswith("at most 60 s left")
    assert last.endswith("1,000 targets/s")


def test_a_trial_that_goes_on_says_it_once_there_is_a_pace():
    first, second = told((6, 500.0, 3), (8, 20.0, 4))
    assert first.endswith("1,000 targets/s")
    assert second.endswith("at most 20 s left")


def test_a_stage_that_cannot_rank_yet_says_its_loss():
    lines = []
    result = {
        "epoch": 2,
        "time_this_iter_s": 30.0,
        "training_iteration": 1,
        "augmenter/total": 3.21987,
        "targets_per_s": 1000.0,
    }
    trial = SimpleNamespace(config={"trial": OURS.name})
    Tell(lines.append, {OURS.name: OURS}).on_trial_result(1, [], trial, result)
    assert lines == [
        "000-seed0 (full)  epoch 2/10  augmenter/total 3.2199  not ranking yet  1,000 targets/s  "
        "at most 120 s left"
    ]
