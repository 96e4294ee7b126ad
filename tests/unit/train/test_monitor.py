import json

import pytest

from distrl.errors import StorageError
from distrl.tracking import runs
from distrl.train import monitor
from distrl.train.monitor import SELECT_BY, Monitor


@pytest.fixture
def make(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run_id = runs.create_run(uri, "test", "run", {}, artifacts=str(tmp_path / "artifacts"))
    made = []

    def monitor(patience=2):
        made.append(Monitor(uri, run_id, str(tmp_path / "validations.json"), patience))
        return made[-1]

    yield monitor
    for one in made:
        one.close(30.0)


def validate(monitor, *scores):
    for number, score in enumerate(scores, start=1):
        monitor.validated(number * 10, float(number), {SELECT_BY: score})


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ((0.1,), False),
        ((0.1, 0.2, 0.3), False),
        ((0.3, 0.2), False),
        ((0.3, 0.2, 0.1), True),
        ((0.3, 0.3, 0.3), True),  # no better is not better
        ((0.1, 0.3, 0.2, 0.4), False),
    ],
)
def test_training_stops_after_patience_validations_without_a_better_one(make, scores, stops):
    monitor = make(patience=2)
    validate(monitor, *scores)
    assert monitor.should_stop() is stops


def test_without_patience_training_never_stops_early(make):
    monitor = make(patience=None)
    validate(monitor, 0.5, 0.1, 0.1, 0.1, 0.1)
    assert not monitor.should_stop()


def test_validations_outlive_the_process_and_a_repetition_changes_nothing(make, tmp_path):
    first = make()
    validate(first, 0.3, 0.2)
    first.close(30.0)
    again = make()
    again.validated(20, 2.0, {SELECT_BY: 0.9})
    assert [entry[SELECT_BY] for entry in again.validations().values()] == [0.3, 0.2]
    stored = json.loads((tmp_path / "validations.json").read_text())
    assert list(stored) == ["10", "20"]
    assert not again.should_stop()
    again.validated(30, 3.0, {SELECT_BY: 0.1})
    assert again.should_stop()


def test_news_are_told_once(make):
    monitor = make()
    validate(monitor, 0.25)
    monitor.report({"step": 12.0, "epoch": 0.5}, {"encoder/next_item": 9.0})
    monitor.tell("worker 1 failed")
    progress, messages = monitor.news()
    assert progress["step"] == 12.0
    assert messages == ["validated epoch 1 (step 10): NDCG@10 0.2500 (best)", "worker 1 failed"]
    assert monitor.news()[1] == []


def test_a_validation_that_cannot_be_written_is_not_known_and_may_be_told_again(make, monkeypatch):
    def away(uri, content):
        raise StorageError(f"cannot write {uri}")

    one = make()
    with monkeypatch.context() as context:
        context.setattr(monitor, "write_bytes", away)
        with pytest.raises(StorageError):
            validate(one, 0.3)
    assert one.validations() == {}
    validate(one, 0.3)
    assert list(one.validations()) == [10]


def test_a_monitor_starts_while_its_folder_cannot_be_read(make, monkeypatch):
    def away(uri):
        raise StorageError(f"cannot look at {uri}")

    validate(make(), 0.3)
    with monkeypatch.context() as context:
        context.setattr(monitor, "exists", away)
        again = make()
        again.report({"step": 3.0}, {})
        with pytest.raises(StorageError):
            again.should_stop()
    assert list(again.validations()) == [10]
