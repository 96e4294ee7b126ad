"""A run's storage that is away, without a run."""

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError, WorkerGroupError

from distrl import outage, waiting
from distrl.errors import CheckpointError, DistrlError, StorageError
from distrl.outage import through_outages

AWAY = ControllerError(OSError("cannot write the snapshot\nand more"))


@pytest.fixture
def place(monkeypatch):
    """How often the place cannot be written yet, and how long was paused for it."""
    state, now = {"away": 0, "pauses": []}, [0.0]

    def check(uri):
        if state["away"]:
            state["away"] -= 1
            raise StorageError(f"cannot write {uri}")

    def pause(seconds):
        state["pauses"].append(seconds)
        now[0] += seconds

    monkeypatch.setattr(outage, "check_writable", check)
    monkeypatch.setattr(waiting.time, "sleep", pause)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return state


def unborn(error):
    """A controller whose constructor raised."""
    return ActorDiedError(RayTaskError("__init__", f"a trace\n{error}", error))


def attempts(*outcomes):
    """A training that ends so, one attempt after another."""
    left = list(outcomes)

    def train():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return train


def test_training_goes_on_once_the_place_is_there_again(place):
    said = []
    place["away"] = 6
    assert through_outages(attempts(AWAY, "trained"), "s3://runs", 3, said.append) == "trained"
    assert place["pauses"] == [2.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert said[0] == (
        "warning: training stopped, as s3://runs failed it: cannot write the snapshot; it goes on "
        "from the last checkpoint"
    )
    assert said[1] == "warning: cannot write s3://runs; asking again in 2 s"
    assert len(said) == 1 + 6


def test_as_many_outages_are_borne_as_workers_may_fail(place):
    assert through_outages(attempts(AWAY, AWAY, "trained"), "s3://runs", 2, print) == "trained"
    with pytest.raises(StorageError) as ended:
        through_outages(attempts(AWAY, AWAY, AWAY, "trained"), "s3://runs", 2, print)
    assert str(ended.value) == (
        "training stopped 3 times, at last as s3://runs failed it: cannot write the snapshot"
    )
    assert through_outages(attempts(*[AWAY] * 9, "trained"), "s3://runs", -1, print) == "trained"


def test_a_place_that_stays_away_ends_a_run_unless_it_may_take_as_long_as_it_takes(place):
    place["away"] = 200
    with pytest.raises(StorageError, match="cannot write s3://runs"):
        through_outages(attempts(AWAY, "trained"), "s3://runs", 3, lambda line: None)
    assert sum(place["pauses"]) <= waiting.FIRST_PAUSE_S + waiting.LONGEST_OUTAGE_S
    place["away"] = 200
    found = through_outages(attempts(AWAY, "trained"), "s3://runs", -1, lambda line: None)
    assert found == "trained"
    assert place["away"] == 0


def test_attempts_that_come_nowhere_are_made_more_and_more_rarely(place):
    through_outages(attempts(*[AWAY] * 6, "trained"), "s3://runs", -1, print)
    assert place["pauses"] == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_an_attempt_that_came_far_makes_the_next_pause_a_short_one(place):
    lasts = iter([0.0, 0.0, outage.SHORT_S, 0.0])

    def train():
        waiting.time.sleep(next(lasts))
        raise AWAY

    with pytest.raises(StorageError):
        through_outages(train, "s3://runs", 3, print)
    assert place["pauses"] == [0.0, 2.0, 0.0, 4.0, outage.SHORT_S, 2.0, 0.0]


@pytest.mark.parametrize(
    "text",
    ["OSError: When reading 'snapshot': timeout", "distrl.errors.StorageError: cannot write it"],
)
def test_a_controller_that_cannot_begin_for_want_of_storage_is_begun_again(place, text):
    said = []
    found = through_outages(attempts(unborn(text), "trained"), "s3://runs", 1, said.append)
    assert found == "trained"
    assert said == [
        f"warning: training stopped, as s3://runs failed it: {text}; it goes on from the last "
        "checkpoint"
    ]


def test_a_ranking_process_that_was_killed_is_borne_as_often_as_workers_are(place):
    killed, said = ControllerError(WorkerCrashedError()), []
    assert through_outages(attempts(killed, "trained"), "s3://runs", 1, said.append) == "trained"
    assert said[0].startswith("warning: training stopped, as the process that ranks checkpoints")
    with pytest.raises(DistrlError, match=r"lower evaluation\.batch_size"):
        through_outages(attempts(killed, killed), "s3://runs", 1, said.append)


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(GetTimeoutError("of Ray's own")),
        unborn("ValueError: a bug"),
        ActorDiedError(),
        ControllerError(CheckpointError("ledger.json is missing")),
        ControllerError(ValueError("a bug")),
        WorkerGroupError("a worker failed", {0: OSError("no such file")}),
    ],
)
def test_what_is_no_outage_ends_the_run(place, error):
    with pytest.raises(type(error)):
        through_outages(attempts(error, "trained"), "s3://runs", -1, print)
