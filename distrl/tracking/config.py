"""Where runs and models are tracked. Imports no MLflow, so that a wrong key fails at once."""

import os
import re

from pydantic import model_validator

from distrl.errors import ConfigError
from distrl.schema import Config
from distrl.storage import absolute, is_local, join

SQLITE = "sqlite:///"


class TrackingConfig(Config):
    """The MLflow that keeps curves, models and aliases."""

    uri: str | None = None
    """Any MLflow tracking URI. None: MLFLOW_TRACKING_URI from the environment, else an SQLite
    database beside the runs, which needs a local storage_uri. Without credentials: those belong
    into the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD)."""
    experiment: str = "distrl"
    artifact_uri: str | None = None
    """Where the experiment's artifacts go when it is made. None: beside an SQLite database, and
    what the server says otherwise."""

    @model_validator(mode="after")
    def _without_credentials(self) -> "TrackingConfig":
        for name, uri in (("uri", self.uri), ("artifact_uri", self.artifact_uri)):
            if uri is not None and masked(uri) != uri:
                raise ValueError(
                    f"{name}={masked(uri)} carries credentials; put them into the environment "
                    "instead (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD "
                    "for PostgreSQL, or the whole URI as MLFLOW_TRACKING_URI)"
                )
        return self


def masked(uri: str) -> str:
    """The URI as it may be shown: with *** for a user name and a password."""
    credentials = _credentials(uri)
    return uri.replace(f"{credentials}@", "***@", 1) if credentials else uri


def scrubbed(text: str, uri: str) -> str:
    """What a library said about a URI, without the URI's credentials."""
    credentials = _credentials(uri)
    if not credentials:
        return text
    text = text.replace(uri, masked(uri)).replace(credentials, "***")
    password = credentials.partition(":")[2]
    return re.sub(rf"\b{re.escape(password)}\b", "***", text) if password else text


def _credentials(uri: str) -> str:
    """`user:password` of a URI, empty where it has none."""
    netloc = uri.partition("://")[2].partition("/")[0]
    return netloc.rpartition("@")[0]


def resolve_tracking_uri(config: TrackingConfig, storage_uri: str) -> str:
    """The tracking URI of a run whose results are kept at `storage_uri`.

    Not for showing: one from the environment may carry credentials (see `masked`).

    Raises:
        ConfigError: If the default cannot serve because the storage is remote.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        path = uri.removeprefix(SQLITE)
        # A relative path would mean another file on each process of a cluster.
        return uri if path == uri else SQLITE + absolute(path)
    if not is_local(storage_uri):
        raise ConfigError(
            f"tracking.uri is not set and storage_uri={storage_uri} is remote, where an SQLite "
            "database cannot lie: set tracking.uri to an MLflow server such as "
            "http://host:5000, or to sqlite:////folder/of/the/driver/mlflow.db"
        )
    return SQLITE + join(absolute(storage_uri), "mlflow.db")


def artifact_location(config: TrackingConfig, tracking_uri: str) -> str | None:
    """Where a new experiment keeps its artifacts; None leaves it to the server."""
    if config.artifact_uri is not None:
        return absolute(config.artifact_uri)
    if not tracking_uri.startswith(SQLITE):
        return None
    folder = tracking_uri.removeprefix(SQLITE).rpartition("/")[0]
    return join(folder, "mlartifacts")
