"""One MLflow run for one training run: made, found, taken up again and ended by the driver."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from pydantic import BaseModel

from distrl.errors import TrackingError
from distrl.tracking.config import masked
from distrl.tracking.connection import speaking_to

PACKAGES = ("distrl", "torch", "ray", "deepspeed", "mlflow", "pyarrow", "numpy")


def create_run(
    uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    *,
    artifacts: str | None = None,
) -> str:
    """A new run, in an experiment that is made where it is missing.

    Args:
        uri: The tracking URI.
        experiment: Its name.
        name: Of the run; MLflow does not mind two of one name.
        tags: Of the run.
        artifacts: Where a new experiment keeps its artifacts; None leaves it to the server.

    Returns:
        The run's id.

    Raises:
        TrackingError: If MLflow refuses or cannot be reached.
    """
    with speaking_to(uri, f"create run {name}") as client:
        experiment_id = _experiment(client, experiment, artifacts)
        return client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    return client.create_experiment(name, artifact_location=artifacts)


def find_run(uri: str, experiment: str, name: str) -> str | None:
    """Id of the newest run of a name, None where there is none.

    Raises:
        TrackingError: If MLflow cannot be reached.
    """
    with speaking_to(uri, f"look for run {name}") as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        runs = client.search_runs(
            [found.experiment_id],
            f"attributes.run_name = {_quoted(name)}",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return runs[0].info.run_id if runs else None


def _quoted(text: str) -> str:
    if "'" in text:
        raise TrackingError(f"name {text!r} holds a quote, which MLflow cannot search for")
    return f"'{text}'"


def resume_run(uri: str, run_id: str) -> None:
    """Marks a run as running again.

    Raises:
        TrackingError: If there is no such run, or MLflow cannot be reached.
    """
    with speaking_to(uri, f"take up run {run_id}") as client:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            raise TrackingError(f"run {run_id} was deleted from {masked(uri)}")
        client.update_run(run_id, status="RUNNING")


def finish_run(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Ends a run.

    Raises:
        TrackingError: If MLflow refuses or cannot be reached.
    """
    with speaking_to(uri, f"end run {run_id}") as client:
        client.set_terminated(run_id, status)


def flat_params(config: BaseModel) -> dict[str, str]:
    """The resolved config as MLflow params: `section.key` to its value in JSON, strings as is."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in _leaves(config.model_dump(mode="json"), ())
    }


def _leaves(node: Mapping[str, Any], path: tuple[str, ...]) -> Sequence[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in node.items():
        here = (*path, key)
        leaves += _leaves(value, here) if isinstance(value, dict) else [(".".join(here), value)]
    return leaves


def environment_tags() -> dict[str, str]:
    """Versions of what decides the numbers, and the git commit of the code where it has one."""
    tags = {f"version.{name}": metadata.version(name) for name in PACKAGES}
    folder = Path(__file__).parents[2]
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return tags  # an installed package, or the working directory of a submitted job
    # MLflow's own name for it, which its pages show.
    return tags | {"mlflow.source.git.commit": commit, "git.dirty": str(bool(dirty)).lower()}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
