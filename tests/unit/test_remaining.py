"""What Ray is given when workers start, and when the run's folder is away."""

import signal
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from distrl import launch, remaining
from distrl.config import RunConfig
from distrl.data.plan import Ledger
from distrl.data.store import manifest_hash
from distrl.errors import StorageError
from distrl.remaining import Remaining
from tests.store_factory import make_store


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A run of a small store, what the user is told, and a ledger that may be away."""
    manifest = make_store(tmp_path / "store", [[1, 2, 3, 4, 5]] * 8, num_items=5)
    told, state = [], {"away": 0}
    monitor = SimpleNamespace(tell=SimpleNamespace(remote=told.append))

    def ledger(run_uri, store_hash):
        if state["away"]:
            state["away"] -= 1
            raise StorageError(f"{run_uri} cannot be read")
        return Ledger(store_hash)

    monkeypatch.setattr(remaining, "committed_ledger", ledger)
    monkeypatch.setattr(remaining, "training_dataset", lambda *_, ledger, **__: ledger)
    monkeypatch.setattr(remaining.time, "sleep", lambda seconds: told.append(seconds))

    def made(max_failures):
        settings = {"name": "a", "data": {"store_uri": str(tmp_path / "store")}}
        method = {"name": "sasrec"}
        run = RunConfig.model_validate(
            {**settings, "method": method, "workers": {"max_failures": max_failures}}
        )
        return Remaining(run, manifest, None, "s3://runs/a", manifest_hash(manifest), monitor)

    return made, state, told


def test_a_folder_that_is_away_is_asked_again_as_often_as_workers_may_fail(asked):
    made, state, told = asked
    makes = made(2)
    for away in (2, 2):  # what has come back may go away again
        state["away"] = away
        for _ in range(away):
            with pytest.raises(WorkerGroupStartupFailedError):
                makes()
        assert isinstance(makes(), Ledger)
    assert [told[1], told[3]] == [2.0, 4.0]
    assert told[0] == (
        "warning: workers cannot start: s3://runs/a cannot be read; trying again in 2 s"
    )
    state["away"] = 9
    for _ in range(2):
        with pytest.raises(WorkerGroupStartupFailedError):
            makes()
    with pytest.raises(StorageError):
        makes()


def test_without_a_bound_it_is_asked_for_ever_with_longer_pauses(asked):
    made, state, told = asked
    makes = made(-1)
    state["away"] = 9
    for _ in range(9):
        with pytest.raises(WorkerGroupStartupFailedError):
            makes()
    assert [pause for pause in told if isinstance(pause, float)][-2:] == [30.0, 30.0]
    assert isinstance(makes(), Ledger)


def test_ctrl_c_is_pythons_again_once_ray_has_trained():
    before = signal.getsignal(signal.SIGINT)
    with launch._own_interrupts():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
