"""A run's folder, with a real MLflow database."""

import json
from pathlib import Path

import pytest

from distrl.config import RunConfig, load_config
from distrl.errors import CheckpointError, ConfigError
from distrl.folder import RunFolder

CONFIG = Path(__file__).parents[2] / "configs/sracl/beauty.yaml"
MADE_OF = {"store_manifest": "a" * 64, "neighbors_table": "b" * 64}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder, its run and MLflow's place."""
    place = tmp_path_factory.mktemp("runs")
    run = load_config(RunConfig, CONFIG, [f"storage_uri={place}"])
    folder, uri = RunFolder(str(place / run.name)), f"sqlite:///{place}/mlflow.db"
    return folder, run, uri, folder.open(run, MADE_OF, uri, resume=False)


def test_a_run_is_reopened_with_what_it_began_with(started):
    folder, run, uri, run_id = started
    assert folder.open(run, MADE_OF, uri, resume=True) == run_id
    start = json.loads(folder.read("run.json"))
    assert {what: start[what] for what in MADE_OF} == MADE_OF
    longer = run.model_copy(update={"training": run.training.model_copy(update={"epochs": 99})})
    assert folder.open(longer, MADE_OF, uri, resume=True) == run_id
    faster = run.model_copy(update={"data": run.data.model_copy(update={"read_tasks": 4})})
    assert folder.open(faster, MADE_OF, uri, resume=True) == run_id


@pytest.mark.parametrize("what", MADE_OF)
def test_another_store_or_table_is_refused(started, what):
    folder, run, uri, _ = started
    said = rf"{folder.uri} began with {what}={MADE_OF[what][:12]}, which is now cccccccccccc: "
    with pytest.raises(CheckpointError, match=said):
        folder.open(run, MADE_OF | {what: "c" * 64}, uri, resume=True)


def test_another_config_is_refused(started):
    folder, run, uri, _ = started
    other = run.model_copy(update={"seed": run.seed + 1})
    with pytest.raises(ConfigError, match=r"another config: seed=1 \(was 0\)"):
        folder.open(other, MADE_OF, uri, resume=True)
    other = run.model_copy(update={"data": run.data.model_copy(update={"batch_size": 32})})
    with pytest.raises(ConfigError, match=r"data\.batch_size=32 \(was 64\)"):
        folder.open(other, MADE_OF, uri, resume=True)


def test_whom_a_checkpoint_is_chosen_by_may_not_change_and_how_they_are_ranked_may(started):
    folder, run, uri, run_id = started
    faster = run.evaluation.model_copy(update={"num_workers": 9, "batch_size": 64})
    faster = run.model_copy(update={"evaluation": faster})
    assert folder.open(faster, MADE_OF, uri, resume=True) == run_id
    fewer = run.evaluation.model_copy(update={"validation_users": 100})
    fewer = run.model_copy(update={"evaluation": fewer})
    with pytest.raises(ConfigError, match=r"evaluation\.validation_users=100 \(was None\)"):
        folder.open(fewer, MADE_OF, uri, resume=True)


def test_a_used_name_and_a_resumption_of_nothing_are_refused(started, tmp_path):
    folder = started[0]
    with pytest.raises(ConfigError, match=r"name=beauty-sracl: .* exists; choose another name"):
        folder.check_name(resume=False)
    folder.check_name(resume=True)
    with pytest.raises(ConfigError, match="there is no run to resume"):
        RunFolder(str(tmp_path / "other")).check_name(resume=True)
