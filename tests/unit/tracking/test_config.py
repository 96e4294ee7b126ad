import pytest

from distrl.config import load_config
from distrl.errors import ConfigError
from distrl.tracking.config import (
    TrackingConfig,
    artifact_location,
    masked,
    resolve_tracking_uri,
    scrubbed,
)


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_default_is_a_database_and_artifacts_beside_local_runs(tmp_path):
    uri = resolve_tracking_uri(TrackingConfig(), str(tmp_path / "runs"))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert artifact_location(TrackingConfig(), uri) == f"{tmp_path}/runs/mlartifacts"


def test_a_relative_database_is_the_same_file_from_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrackingConfig(uri="sqlite:///mine.db")
    assert resolve_tracking_uri(config, "s3://bucket/runs") == f"sqlite:///{tmp_path}/mine.db"


def test_remote_storage_without_a_tracking_uri_says_what_to_set():
    with pytest.raises(ConfigError, match=r"tracking\.uri is not set.*s3://bucket/runs.*http://"):
        resolve_tracking_uri(TrackingConfig(), "s3://bucket/runs")


def test_the_environment_names_the_server_unless_the_config_does(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert resolve_tracking_uri(TrackingConfig(), "s3://b") == "http://from-environment:5000"
    config = TrackingConfig(uri="http://from-config:5000")
    assert resolve_tracking_uri(config, "s3://b") == "http://from-config:5000"


def test_a_server_decides_where_its_artifacts_go_unless_the_config_does():
    assert artifact_location(TrackingConfig(), "http://host:5000") is None
    config = TrackingConfig(artifact_uri="s3://bucket/artifacts")
    assert artifact_location(config, "http://host:5000") == "s3://bucket/artifacts"


@pytest.mark.parametrize("key", ["uri", "artifact_uri"])
def test_credentials_in_a_config_are_refused_without_being_shown(key):
    with pytest.raises(ConfigError) as error:
        load_config(TrackingConfig, None, [f"{key}=http://alice:hunter2@host:5000"])
    assert f"{key}=http://***@host:5000 carries credentials" in str(error.value)
    assert "MLFLOW_TRACKING_PASSWORD" in str(error.value)
    assert "alice" not in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://alice:hunter2@host:5000/a@b", "http://***@host:5000/a@b"),
        ("postgresql+psycopg2://alice@host/db", "postgresql+psycopg2://***@host/db"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_a_uri_is_shown_without_credentials(uri, shown):
    assert masked(uri) == shown


def test_what_a_library_says_about_a_uri_loses_its_credentials():
    uri = "http://alice:hunter2@host:5000"
    said = "no answer from http://alice:hunter2@host:5000/api, user alice:hunter2, key hunter2."
    assert scrubbed(said, uri) == "no answer from http://***@host:5000/api, user ***, key ***."
