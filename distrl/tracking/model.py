"""A trained model's folder as an MLflow model: signature, requirements and the code that serves it.

The code is a copy of the packages below, so the model loads where neither distrl nor Ray nor
DeepSpeed is installed.
"""

import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Literal

import mlflow.pyfunc
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

import distrl
from distrl.tracking.connection import speaking_to

SERVED_CODE = (
    "__init__.py",
    "errors.py",
    "schema.py",
    "contract.py",
    "ops",
    "nn",
    "methods",
    "serving",
)
SERVED_BY = "serving/pyfunc.py"
ARTIFACT = "recommender"
REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "pydantic",
    "jaxtyping",
)


def log_model(
    uri: str,
    run_id: str,
    folder: Path,
    item_type: Literal["string", "int64"],
    *,
    name: str = "model",
) -> str:
    """Logs a model's folder, as `distrl.serving.artifact` writes it, with the run that trained it.

    Args:
        uri: The tracking URI.
        run_id: The run that trained it.
        folder: The model's folder on this machine.
        item_type: Type of the caller's own item ids.
        name: Of the model within the run.

    Returns:
        Its URI, `models:/m-...`.

    Raises:
        TrackingError: If MLflow refuses or cannot be reached.
    """
    with speaking_to(uri, f"log the model of run {run_id}") as client:
        experiment_id = client.get_run(run_id).info.experiment_id
        logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id)
        with tempfile.TemporaryDirectory(prefix="distrl-model-") as temporary:
            description = Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                run_id=run_id,
                model_id=logged.model_id,
            )
            saved = Path(temporary, "model")
            save_model(saved, folder, item_type, description)
            client.log_model_artifacts(logged.model_id, str(saved))
        client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=0)])
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return f"models:/{logged.model_id}"


def save_model(
    target: Path, folder: Path, item_type: Literal["string", "int64"], description: Model
) -> None:
    """Writes the MLflow model of a model's folder to a new folder on this machine."""
    package = Path(distrl.__file__).parent
    with tempfile.TemporaryDirectory(prefix="distrl-code-") as temporary:
        code = Path(temporary, "distrl")
        code.mkdir()
        for entry in SERVED_CODE:
            _copy(package / entry, code / entry)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input example was not provided")
            mlflow.pyfunc.save_model(
                str(target),
                python_model=str(code / SERVED_BY),
                code_paths=[str(code)],
                artifacts={ARTIFACT: str(folder)},
                signature=signature(item_type),
                pip_requirements=requirements(),
                mlflow_model=description,
            )


def signature(item_type: Literal["string", "int64"]) -> ModelSignature:
    """In: histories of the caller's own ids. Out: the top items and their scores."""
    item = {"string": DataType.string, "int64": DataType.long}[item_type]
    return ModelSignature(
        inputs=Schema([ColSpec(Array(item), "history")]),
        outputs=Schema(
            [
                ColSpec(Array(item), "items"),
                ColSpec(Array(DataType.double), "scores"),
                ColSpec(DataType.long, "num_unknown"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("k", DataType.long, 10),
                ParamSpec("mask_seen", DataType.boolean, False),
            ]
        ),
    )


def requirements() -> list[str]:
    """What the model needs to be served, at the versions it was made with."""
    # A local version such as 2.13.0+cpu names a build that a package index may not have.
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
