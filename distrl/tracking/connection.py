"""How distrl talks to MLflow: less patiently than MLflow would, and with errors one can act on.

MLflow retries a dead server for about four minutes and prints as it goes. Nothing here is as
patient, and nothing here shows the credentials of a URI.
"""

import fcntl
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from distrl.errors import TrackingError
from distrl.tracking.config import SQLITE, masked, scrubbed

FAILURES = (MlflowException, SQLAlchemyError, OSError, ImportError)
"""What MLflow, its database layer, its HTTP client and a missing database driver raise."""

OUR_MANNERS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It would print the address of each run, with the credentials of the URI.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""For this process, unless the user's environment says otherwise."""

PROBE_S = 5
DEADLINE_S = 10.0

_settings_lock = threading.RLock()


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process's environment inside the block, one block at a time.

    MLflow reads its settings from there at each call, so other threads see them meanwhile, too.
    """
    with _settings_lock:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def patience(*, retries: int, request_s: int) -> AbstractContextManager[None]:
    """Limits how long MLflow's HTTP client tries, inside the block."""
    return environment(
        {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_s),
        }
    )


@contextmanager
def speaking_to(uri: str, purpose: str) -> Iterator[MlflowClient]:
    """A client for the block; what fails inside it becomes one TrackingError.

    Args:
        uri: The tracking URI.
        purpose: What the block does, for the message: "register model m".

    Raises:
        TrackingError: Naming the purpose and the URI.
    """
    try:
        yield client(uri)
    except FAILURES as error:
        # The cause may spell the credentials, so it must not travel along.
        raise TrackingError(f"cannot {purpose} in {masked(uri)}: {reason(error, uri)}") from None


def client(uri: str) -> MlflowClient:
    """MLflow's client, for runs and registry alike, without its chatter."""
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It announces each retry; the error or the warning that follows says it once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    for name, value in OUR_MANNERS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(uri, registry_uri=uri)


def reason(error: Exception, uri: str) -> str:
    """What went wrong in one line, without credentials."""
    said = str(error).strip() or type(error).__name__
    # urllib3 wraps the system's own words, "[Errno 111] Connection refused" say, into a paragraph.
    inner = re.search(r"\[Errno -?\d+\] [\w ,.]+", said) if "Max retries" in said else None
    return scrubbed(inner.group() if inner else said.splitlines()[0], uri)


def check_reachable(uri: str) -> None:
    """Proves on the driver that MLflow answers, within about ten seconds.

    Raises:
        TrackingError: Naming the URI, if it does not.
    """
    failure: list[str] = []

    def probe() -> None:
        try:
            _probe(uri)
        except FAILURES as error:
            failure.append(reason(error, uri))

    # A thread, because a host that swallows packets holds a database driver for minutes.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(None if uri.startswith(SQLITE) else DEADLINE_S)
    if thread.is_alive():
        failure.append(f"no answer within {DEADLINE_S:.0f} s")
    if failure:
        raise TrackingError(
            f"MLflow at {masked(uri)} cannot be reached: {failure[0]}; "
            "start it, or set tracking.uri to one that runs"
        )
    with _alone(uri), speaking_to(uri, "list experiments") as mlflow:
        mlflow.search_experiments(max_results=1)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: two that make the tables of a new SQLite file break each other's."""
    if not uri.startswith(SQLITE):
        yield
        return
    with Path(uri.removeprefix(SQLITE) + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _probe(uri: str) -> None:
    """One try: MLflow itself would retry a dead database, too."""
    scheme = uri.partition("://")[0]
    if scheme in ("http", "https"):
        with patience(retries=0, request_s=PROBE_S):
            client(uri).search_experiments(max_results=1)
    elif scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        engine = sqlalchemy.create_engine(uri)
        engine.connect().close()
        engine.dispose()
    elif uri.startswith(SQLITE):
        folder = Path(uri.removeprefix(SQLITE)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    else:
        raise MlflowException(
            f"{scheme or uri!r} is not a scheme that distrl tracks to: http, https, sqlite, "
            "postgresql, mysql, mssql"
        )
