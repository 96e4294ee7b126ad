"""What the user is told of a run while Ray holds its driver's thread."""

import time

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import ControllerError

from distrl import watch
from distrl.config import TrainingConfig
from distrl.errors import CheckpointError, StorageError
from distrl.train.causes import cause, in_a_line
from distrl.watch import TellFailures, Watch


class Answers:
    """A monitor whose answers lie in files of Ray's, or are not there yet."""

    def __init__(self):
        self.news = self.tell = self
        self.told, self.asked, self.answer = [], 0, None

    def remote(self, *said):
        if said:
            self.told.extend(said)
            return None
        self.asked += 1
        return self.answer


@pytest.fixture
def answers(monkeypatch):
    """The monitor's answers as values: None is one that has not come."""
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs if refs[0] != "slow" else [], []))
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Answers()


def report(step):
    return {
        "step": step, "epoch": 0.5, "eta_s": 60.0, "rows_per_s": 1.0, "targets_per_s": 1.0,
        "wait_share": 0.0,
    }  # fmt: skip


def test_the_users_mistake_is_found_in_whatever_ray_wraps_it_in():
    mistake = CheckpointError("ledger.json is missing")
    assert cause(ControllerError(mistake)) is mistake
    away = RuntimeError("cannot start")
    away.__cause__ = StorageError("away")
    assert cause(ControllerError(away)) is away.__cause__
    nobodys = ControllerError(RuntimeError("a bug"))
    assert cause(nobodys) is nobodys


def test_what_an_actor_raised_is_said_without_its_trace():
    away = StorageError("cannot write validations.json")
    both = RayTaskError("validated", "a trace\nof many lines", away).as_instanceof_cause()
    assert isinstance(both, StorageError)
    assert cause(ControllerError(both)) is away
    assert in_a_line(both) == "cannot write validations.json"
    assert in_a_line(ControllerError(RuntimeError("a bug"))).endswith("a bug")


def test_an_answer_that_takes_long_is_waited_for_and_not_asked_for_twice(answers):
    said = []
    looks = Watch(answers, TrainingConfig(), said.append)
    answers.answer = "slow"
    looks._tell()
    looks._tell()
    assert (answers.asked, said) == (1, [])
    looks._asked = ({}, ["worker 1 failed"])
    looks._tell()
    assert said == ["worker 1 failed"]
    assert answers.asked == 1


def test_silence_is_told_of_at_first_and_after_steps(answers, monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    free = {"CPU": 0.5}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    looks = Watch(answers, TrainingConfig(), said.append)

    def at(moment, step=None):
        now[0], answers.answer = moment, ({} if step is None else report(step), [])
        before = len(said)
        looks._tell()
        return said[before:]

    assert at(119.0) == []
    assert at(121.0)[0].startswith("21 s and no report yet")
    assert at(122.0) == []
    assert at(130.0, 20)[0].startswith("epoch 0.50")
    assert at(160.0, 40)[0].startswith("epoch 0.50")
    # Thirty seconds between reports are usual here, so that ninety are waited for.
    assert at(160.0 + watch.LATER_SILENCE_S + 5, 40) == []
    (line,) = at(255.0, 40)
    assert line.startswith("95 s and no news after step 40")
    assert "0.5 of 2 CPU free" in line
    assert at(256.0, 40) == []
    # What had to be told of is not how long reports usually take.
    assert at(400.0, 60)[0].startswith("epoch 0.50")
    assert at(495.0, 60)[0].startswith("95 s and no news after step 60")


def test_a_failure_is_told_of_once_and_another_or_a_later_one_again(monkeypatch):
    answers, now = Answers(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    callback = TellFailures(answers)
    first, other = ValueError("no memory"), ValueError("no disk")
    for error in (first, first, other):
        callback.after_exception(None, {1: error})
    now[0] += watch.REPEATS_S
    callback.after_exception(None, {1: first})
    assert [line.split(";")[0] for line in answers.told] == [
        "warning: worker 1 failed: no memory",
        "warning: worker 1 failed: no disk",
        "warning: worker 1 failed: no memory",
    ]
