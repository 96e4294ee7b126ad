"""Lay the views of trained models out in two dimensions, to see whether they collapse.

    python jobs/map_views.py configs/map-views.yaml
    python jobs/map_views.py 'models=[{label: mine, uri: runs/mine}]' num_pairs=500

Shows the same prefixes of the store to every model, with views as its run draws them. Draws a t-SNE
map of the data views (h) and, where the method has augmenters, of the learned views (z); writes the
picture, the coordinates as CSV and the diagnostics as JSON to output_uri, and into MLflow where
tracking.uri is given. Needs no Ray.
"""

import json

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from distrl.errors import CheckpointError
from distrl.folder import RESULT_FILE
from distrl.schema import Config
from distrl.storage import absolute, check_writable, exists, join, read_bytes, write_bytes
from distrl.tracking.config import TrackingConfig, artifact_location, resolve_tracking_uri
from distrl.tracking.run_log import RunLog
from distrl.tracking.runs import create_run, environment_tags, finish_run, flat_params
from distrl.train.view_maps import ViewMap, check_alike, map_views, read_model
from distrl.train.view_picture import as_csv, as_json, picture, table
from jobs.command import arguments, resolve, run

FLUSH_S = 60.0


class ModelToMap(Config):
    """One column of the picture."""

    label: str
    """What the picture calls it."""
    uri: str
    """Folder of a checkpoint, or of a finished run, which means its best checkpoint."""


class MapViewsConfig(Config):
    """Which models, on which pairs, and where the picture goes."""

    models: tuple[ModelToMap, ...] = Field(min_length=1)
    store_uri: str | None = None
    """The sequence store. None: the one that the models were trained on."""
    num_pairs: PositiveInt = 1000
    """Contrasted pairs; each is two points of a map."""
    num_lines: NonNegativeInt = 150
    """Pairs whose two points are joined."""
    perplexity: PositiveFloat = 30.0
    """Of t-SNE: about how many neighbors a point keeps near."""
    seed: NonNegativeInt = 0
    """Of the samples, their views and the layout."""
    name: str = "views"
    """Of the files, and of the run in MLflow."""
    output_uri: str = "runs/views"
    """Folder for <name>.png, .csv and .json."""
    tracking: TrackingConfig = TrackingConfig()
    """The picture is kept in MLflow too where `uri` is given."""

    @model_validator(mode="after")
    def _enough_pairs(self) -> "MapViewsConfig":
        if self.perplexity >= 2 * self.num_pairs - 1:
            raise ValueError(
                f"perplexity={self.perplexity:g} is not below the {2 * self.num_pairs - 1} "
                f"neighbors that a point has with num_pairs={self.num_pairs}"
            )
        if len({model.label for model in self.models}) < len(self.models):
            labels = ", ".join(model.label for model in self.models)
            raise ValueError(f"models: two have one label ({labels}); give each its own")
        return self


def main() -> None:
    """Draws one picture of all models."""
    config = resolve(MapViewsConfig, arguments(__doc__, config_optional=True).parse_args())
    output_uri = absolute(config.output_uri)
    check_writable(output_uri)
    models = [
        read_model(model.label, checkpoint_of(absolute(model.uri)), config.store_uri)
        for model in config.models
    ]
    check_alike(models)
    maps: list[ViewMap] = []
    for model in models:
        maps += map_views(
            model, num_pairs=config.num_pairs, perplexity=config.perplexity, seed=config.seed
        )
    print(table(maps), flush=True)
    about = {"config": config.model_dump(mode="json"), "views": as_json(maps)}
    files = {
        f"{config.name}.png": picture(maps, num_lines=config.num_lines),
        f"{config.name}.csv": as_csv(maps).encode(),
        f"{config.name}.json": json.dumps(about, indent=1).encode(),
    }
    for name, content in files.items():
        write_bytes(join(output_uri, name), content)
        print(join(output_uri, name))
    if config.tracking.uri is not None:
        _track(config, files)


def checkpoint_of(uri: str) -> str:
    """The folder of a checkpoint: the one named, or the best one of a finished run.

    Raises:
        CheckpointError: If the run's result is torn.
        StorageError: If the place cannot be read.
    """
    result_uri = join(uri, RESULT_FILE)
    if not exists(result_uri):
        return uri
    try:
        step = int(json.loads(read_bytes(result_uri))["best_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{result_uri} is torn: it names no best_step") from error
    return join(uri, f"checkpoint-{step:09d}")


def _track(config: MapViewsConfig, files: dict[str, bytes]) -> None:
    """Keeps the files in a run of their own."""
    uri = resolve_tracking_uri(config.tracking, config.output_uri)
    run_id = create_run(
        uri,
        config.tracking.experiment,
        config.name,
        environment_tags(),
        artifacts=artifact_location(config.tracking, uri),
    )
    log = RunLog(uri, run_id)
    log.log_params(flat_params(config))
    for name, content in files.items():
        log.log_bytes(name, content)
    log.close(FLUSH_S)
    finish_run(uri, run_id, "FINISHED")
    print(f"MLflow run {run_id} in experiment {config.tracking.experiment}")


if __name__ == "__main__":
    run(main)
