"""Runs, curves and registry against a real MLflow: SQLite, and a server that is killed."""

import json
import logging
import socket
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from distrl.errors import TrackingError
from distrl.tracking.config import TrackingConfig, artifact_location, resolve_tracking_uri
from distrl.tracking.connection import check_reachable
from distrl.tracking.registry import CHAMPION, PREVIOUS, Registry
from distrl.tracking.run_log import RunLog
from distrl.tracking.runs import create_run, find_run, finish_run, resume_run
from tests.integration.servers import free_port, mlflow_server

PATIENCE_S = 60


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The default: SQLite beside the runs. Yields its URI and where artifacts go."""
    config, storage = TrackingConfig(), str(tmp_path_factory.mktemp("runs"))
    uri = resolve_tracking_uri(config, storage)
    check_reachable(uri)
    return uri, artifact_location(config, uri)


@pytest.fixture
def run(database):
    """URI and id of a new run."""
    uri, artifacts = database
    return uri, create_run(uri, "distrl", "a-run", {"seed": "7"}, artifacts=artifacts)


def history(uri, run_id, key):
    """(step, value) of every point that MLflow has, in order of steps."""
    points = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_everything_a_run_tells_arrives(run, database):
    uri, run_id = run
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    log = RunLog(uri, run_id)
    log.log_params({"method.name": "mclrec", "long": "x" * 7000})
    log.log_metrics(20, {"encoder/next_item": 9.5, "epoch": 0.1})
    log.log_metrics(40, {"encoder/next_item": 9.25, "epoch": 0.2})
    log.set_tags({"restarts": "1"})
    log.log_text("notes/why.txt", "because")
    log.log_dict("config.json", {"seed": 7})
    log.log_figure("curves/loss.png", figure)
    assert log.close(PATIENCE_S) == []

    found = MlflowClient(uri).get_run(run_id)
    assert found.data.params["method.name"] == "mclrec"
    assert found.data.params["long"] == "x" * 5997 + "..."
    assert found.data.tags["restarts"] == "1"
    assert history(uri, run_id, "encoder/next_item") == [(20, 9.5), (40, 9.25)]
    assert found.info.artifact_uri.startswith(database[1])
    client = MlflowClient(uri)
    config, why, curves = (
        Path(client.download_artifacts(run_id, name))
        for name in ("config.json", "notes/why.txt", "curves/loss.png")
    )
    assert json.loads(config.read_text()) == {"seed": 7}
    assert why.read_text() == "because"
    assert curves.read_bytes().startswith(b"\x89PNG")


def test_a_restart_goes_on_in_the_same_run_and_doubles_no_point(run):
    uri, run_id = run
    before = RunLog(uri, run_id)
    for step in (10, 20, 30):
        before.log_metrics(step, {"loss": step / 10})
    assert before.close(PATIENCE_S) == []
    finish_run(uri, run_id, "FAILED")

    resume_run(uri, run_id)
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    after = RunLog(uri, run_id)
    for step in (20, 30, 40):  # the last checkpoint was at step 10
        after.log_metrics(step, {"loss": 99.0})
    after.log_metrics(30, {"val/ndcg_at_10": 0.5})  # late, and new all the same
    after.log_metrics(40, {"loss": 100.0})  # the workers restarted within this process
    assert after.close(PATIENCE_S) == []
    assert history(uri, run_id, "loss") == [(10, 1.0), (20, 2.0), (30, 3.0), (40, 99.0)]
    assert history(uri, run_id, "val/ndcg_at_10") == [(30, 0.5)]


def test_a_refused_name_is_told_and_holds_nothing_up(run, caplog):
    uri, run_id = run
    log = RunLog(uri, run_id)
    log.log_metrics(1, {"loss": 1.0, "ndcg@10": 0.5, "epoch": 0.1})
    log.log_metrics(2, {"loss": 2.0})
    log.log_params({"seed": "7"})
    log.log_params({"seed": "8", "more": "yes"})
    assert log.close(PATIENCE_S) == []
    assert history(uri, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert history(uri, run_id, "epoch") == [(1, 0.1)]
    assert MlflowClient(uri).get_run(run_id).data.params == {"seed": "7", "more": "yes"}
    refused = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(refused) == 2
    assert "refuses metric 'ndcg@10'" in refused[0]
    assert "refuses param 'seed'" in refused[1]


def test_a_run_is_found_by_its_name(run):
    uri, run_id = run
    assert find_run(uri, "distrl", "a-run") == run_id
    assert find_run(uri, "distrl", "no-such-run") is None
    assert find_run(uri, "no-such-experiment", "a-run") is None


def test_a_run_that_is_not_there_cannot_be_resumed(database):
    with pytest.raises(TrackingError, match="cannot take up run 0123abcd in sqlite:"):
        resume_run(database[0], "0123abcd")


@pytest.mark.slow
def test_metrics_of_an_outage_arrive_when_the_server_is_back(tmp_path, caplog):
    port = free_port()
    with mlflow_server(tmp_path, port=port) as uri:
        check_reachable(uri)
        run_id = create_run(uri, "distrl", "outage", {})
        log = RunLog(uri, run_id)
        log.log_metrics(1, {"loss": 1.0})
        wait_for(lambda: history(uri, run_id, "loss") == [(1, 1.0)])
    for step in range(2, 1202):
        log.log_metrics(step, {"loss": float(step)})
    log.log_text("during.txt", "the outage")
    wait_for(lambda: caplog.records)
    with mlflow_server(tmp_path, port=port) as uri:
        log.log_metrics(1202, {"loss": 1202.0})
        assert log.close(PATIENCE_S) == []
        expected = [(step, float(step)) for step in range(1, 1203)]
        assert history(uri, run_id, "loss") == expected
        files = [file.path for file in MlflowClient(uri).list_artifacts(run_id)]
        assert files == ["during.txt"]
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"MLflow at {uri} is lost" in warning.getMessage()


def test_what_is_never_delivered_is_handed_back_without_a_secret(caplog):
    uri = f"http://alice:hunter2@127.0.0.1:{free_port()}"
    log = RunLog(uri, "0123abcd")
    log.log_metrics(1, {"loss": 1.0, "epoch": 0.5})
    log.log_metrics(2, {"loss": 2.0})
    log.log_params({"seed": "7"})
    left = log.close(2.0)
    assert left == [(1, {"loss": 1.0, "epoch": 0.5}), (2, {"loss": 2.0})]
    lost, never = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "is lost" in lost
    assert "never got param 'seed'" in never
    assert "***@127.0.0.1" in lost
    for secret in ("alice", "hunter2"):
        assert secret not in caplog.text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["http://", "postgresql+psycopg2://"])
def test_nobody_listening_is_an_error_that_names_the_uri_and_no_secret(scheme):
    port = free_port()
    with pytest.raises(TrackingError) as error:
        check_reachable(f"{scheme}alice:hunter2@127.0.0.1:{port}/x")
    assert f"MLflow at {scheme}***@127.0.0.1:{port}/x cannot be reached" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.timeout(60)
def test_a_server_that_never_answers_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingError, match=r"cannot be reached: \w+"):
            check_reachable(uri)


def test_a_database_in_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TrackingError, match=f"sqlite:///{tmp_path}/file/mlflow.db cannot be"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")


@pytest.fixture
def registry(run, request):
    """A registry with two versions of a model of the test's own."""
    uri, run_id = run
    model, client = request.node.name, MlflowClient(uri)
    registry = Registry(uri)
    experiment = client.get_run(run_id).info.experiment_id
    for number in (1, 2):
        logged = client.create_logged_model(experiment, source_run_id=run_id)
        made = registry.register(
            model, f"models:/{logged.model_id}", run_id, {"kept/ndcg_at_10": str(number)}
        )
        assert (made.number, made.run_id) == (number, run_id)
    return registry, model


def test_versions_come_with_their_tags(registry):
    registry, model = registry
    assert registry.version(model, 1).tags == {"kept/ndcg_at_10": "1"}
    assert registry.version(model, "latest").number == 2
    run_id = registry.version(model, 1).run_id
    assert registry.made_by(model, run_id, {"kept/ndcg_at_10": "1"}).number == 1
    assert registry.made_by(model, run_id, {"kept/ndcg_at_10": "3"}) is None
    assert registry.made_by(model, "another", {}) is None
    assert registry.made_by("no-such-model", run_id, {}) is None
    assert registry.resolve(f"models:/{model}/1").number == 1


def test_aliases_move_and_are_resolved(registry):
    registry, model = registry
    assert registry.alias(model, CHAMPION) is None
    registry.move_aliases(model, expected={CHAMPION: None}, wanted={PREVIOUS: None, CHAMPION: 1})
    registry.move_aliases(model, expected={CHAMPION: 1}, wanted={PREVIOUS: 1, CHAMPION: 2})
    assert registry.resolve(f"models:/{model}@champion").number == 2
    assert registry.resolve(f"models:/{model}@previous").number == 1
    registry.move_aliases(model, expected={}, wanted={PREVIOUS: None})
    assert registry.alias(model, PREVIOUS) is None


def test_an_alias_that_somebody_else_moved_is_left_alone(registry):
    registry, model = registry
    registry.move_aliases(model, expected={}, wanted={CHAMPION: 1})
    with pytest.raises(TrackingError, match=r"is version 1 and was None .* nothing was changed"):
        registry.move_aliases(model, expected={CHAMPION: None}, wanted={CHAMPION: 2})
    assert registry.resolve(f"models:/{model}@champion").number == 1


def test_unknown_models_versions_and_aliases_are_named_with_what_there_is(registry):
    registry, model = registry
    with pytest.raises(TrackingError, match=rf"no registered model nope in sqlite.*{model}"):
        registry.alias("nope", CHAMPION)
    with pytest.raises(TrackingError, match=r"has no version 3; it has 1, 2"):
        registry.version(model, 3)
    with pytest.raises(TrackingError, match="has no alias champion; it has none"):
        registry.resolve(f"models:/{model}@champion")
    with pytest.raises(TrackingError, match="not of the form models:/"):
        registry.resolve(f"models:/{model}")


def wait_for(holds):
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.1)
