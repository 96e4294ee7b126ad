"""Versions of registered models and their aliases.

Two aliases matter: `champion` serves, and `previous` is what served before it, for rolling back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from distrl.errors import TrackingError
from distrl.tracking.config import masked
from distrl.tracking.connection import environment, speaking_to
from distrl.tracking.model import ARTIFACT

CHAMPION = "champion"
PREVIOUS = "previous"
MISSING = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a registered model."""

    model: str
    number: int
    run_id: str | None
    """The run that trained it."""
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """Its URI, `models:/<model>/<number>`."""
        return f"models:/{self.model}/{self.number}"


class Registry:
    """The model registry behind one tracking URI."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def register(self, model: str, model_uri: str, run_id: str, tags: Mapping[str, str]) -> Version:
        """A new version of a model, which is made where it is missing.

        Args:
            model: Name in the registry.
            model_uri: What `distrl.tracking.model.log_model` returned.
            run_id: The run that trained it.
            tags: Such as the store's manifest hash, the split, and metrics.

        Raises:
            TrackingError: If MLflow refuses or cannot be reached.
        """
        with speaking_to(self._uri, f"register {model_uri} as {model}") as client:
            try:
                client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            model_id = model_uri.removeprefix("models:/")
            # With a database in place of a server, MLflow looks the model up where the process's
            # default says, whatever the client was given.
            with environment({"MLFLOW_TRACKING_URI": self._uri}):
                made = client.create_model_version(
                    model, model_uri, run_id, dict(tags), model_id=model_id
                )
        return _version(made)

    def made_by(self, model: str, run_id: str, tags: Mapping[str, str]) -> Version | None:
        """The version that a run has registered with these tags, and maybe others, if any.

        Raises:
            TrackingError: If MLflow refuses or cannot be reached.
        """
        with speaking_to(self._uri, f"look for {model} of run {run_id}") as client:
            for found in client.search_model_versions(f"name='{model}' and run_id='{run_id}'"):
                version = _version(client.get_model_version(model, str(found.version)))
                if tags.items() <= version.tags.items():
                    return version
        return None

    def version(self, model: str, number: int | str) -> Version:
        """One version; "latest" is the newest.

        Raises:
            TrackingError: If there is no such model or version, with those that there are.
        """
        with speaking_to(self._uri, f"look up version {number} of {model}") as client:
            self._model(client, model)
            versions = client.search_model_versions(f"name='{model}'")
            by_number = {int(version.version): version for version in versions}
            wanted = max(by_number, default=0) if number == "latest" else int(number)
            if wanted not in by_number:
                raise TrackingError(
                    f"model {model} in {masked(self._uri)} has no version {number}; it has "
                    f"{_list(sorted(by_number))}"
                )
            # Tags come with a single version, and need not with a search.
            return _version(client.get_model_version(model, str(wanted)))

    def alias(self, model: str, alias: str) -> Version | None:
        """The version that an alias names; None where the model has no such alias.

        Raises:
            TrackingError: If there is no such model, with those that there are.
        """
        with speaking_to(self._uri, f"look up {model}@{alias}") as client:
            number = self._model(client, model).aliases.get(alias)
            return None if number is None else _version(client.get_model_version(model, number))

    def resolve(self, reference: str) -> Version:
        """The version that `models:/<model>/<number>` or `models:/<model>@<alias>` names.

        Raises:
            TrackingError: If it is no such reference, or names nothing, with what there is.
        """
        name = reference.removeprefix("models:/")
        model, at, alias = name.partition("@")
        if at:
            found = self.alias(model, alias)
            if found is None:
                raise TrackingError(
                    f"model {model} in {masked(self._uri)} has no alias {alias}; it has "
                    f"{_list(sorted(self._aliases(model)))}"
                )
            return found
        model, _, number = name.rpartition("/")
        if not model or not (number.isdecimal() or number == "latest"):
            raise TrackingError(
                f"{reference} is not of the form models:/<model>/<number> or "
                "models:/<model>@<alias>"
            )
        return self.version(model, number)

    def _aliases(self, model: str) -> list[str]:
        with speaking_to(self._uri, f"list the aliases of {model}") as client:
            return list(self._model(client, model).aliases)

    def move_aliases(
        self,
        model: str,
        *,
        expected: Mapping[str, int | None],
        wanted: Mapping[str, int | None],
    ) -> None:
        """Sets aliases, if they are still where the caller saw them.

        MLflow offers no compare-and-set, so the aliases are read once more just before they are
        written. Two promotions in the same second can still overwrite each other.

        Args:
            model: The registered model.
            expected: Where the aliases were when the decision was made; None for nowhere.
            wanted: Where they shall be; None removes the alias. Written in this order.

        Raises:
            TrackingError: If an alias moved meanwhile, or MLflow refuses.
        """
        with speaking_to(self._uri, f"move aliases of {model}") as client:
            now = {name: int(number) for name, number in self._model(client, model).aliases.items()}
            for alias, number in expected.items():
                if now.get(alias) != number:
                    raise TrackingError(
                        f"{model}@{alias} is version {now.get(alias)} and was {number} when this "
                        "promotion began: somebody else moved it; nothing was changed, try again"
                    )
            for alias, number in wanted.items():
                if number is not None:
                    client.set_registered_model_alias(model, alias, str(number))
                elif alias in now:
                    client.delete_registered_model_alias(model, alias)

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Sets tags of a version.

        Raises:
            TrackingError: If MLflow refuses or cannot be reached.
        """
        with speaking_to(self._uri, f"tag {version.uri}") as client:
            for key, value in tags.items():
                client.set_model_version_tag(version.model, str(version.number), key, value)

    def download(self, version: Version, target: Path) -> Path:
        """Copies a version to this machine and returns its model folder for `read_artifact`.

        Raises:
            TrackingError: If it cannot be had, or is not a model of distrl.
        """
        with speaking_to(self._uri, f"download {version.uri}") as client:
            source = client.get_model_version_download_uri(version.model, str(version.number))
            root = Path(
                mlflow.artifacts.download_artifacts(
                    source, dst_path=str(target), tracking_uri=self._uri, registry_uri=self._uri
                )
            )
            flavor = Model.load(root).flavors.get("python_function", {})
        entry = flavor.get("artifacts", {}).get(ARTIFACT)
        if entry is None:
            raise TrackingError(f"{version.uri} is not a model that distrl logged")
        return root / entry["path"]

    def _model(self, client: MlflowClient, model: str) -> RegisteredModel:
        try:
            return client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
        there = [found.name for found in client.search_registered_models(max_results=20)]
        raise TrackingError(
            f"there is no registered model {model} in {masked(self._uri)}; there is {_list(there)}"
        )


def _version(found: ModelVersion) -> Version:
    return Version(found.name, int(found.version), found.run_id, dict(found.tags))


def _list(names: list[str] | list[int]) -> str:
    return ", ".join(str(name) for name in names) or "none"
