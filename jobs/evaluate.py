"""Rank a store's held-out items with a trained model, beside popularity and repeat-recent.

    python jobs/evaluate.py configs/evaluate.yaml model_uri=models:/quickstart@champion
    python jobs/evaluate.py store_uri=data/store checkpoint_uri=runs/name/checkpoint-000001000
    python jobs/evaluate.py ... --protocol sampled99

Prints HR, NDCG and MRR over the whole catalog, with seen items kept and masked, and a table by
length of the user's sequence. Writes both as JSON and CSV, and a picture, to output_uri; with
top_k_uri also the best items of every user, in your own ids.

--protocol sampled99 ranks each target among 99 random items instead, as LACLRec's predecessors do;
its figures are not comparable with those of full ranking, and its files are named after it.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pydantic import Field, PositiveInt, model_validator

from distrl.data.evaluation_config import EvaluationConfig, RankingProtocol
from distrl.data.store import check_sizes, read_item_ids, read_manifest
from distrl.errors import ConfigError
from distrl.schema import Config, Split
from distrl.serving.artifact import Artifact
from distrl.storage import absolute, check_writable, join, listing, write_bytes
from distrl.tracking.config import TrackingConfig, resolve_tracking_uri
from distrl.train import progress
from distrl.train.evaluate import check_protocol, evaluate_model, write_best_items
from distrl.train.fleet import connect_for_ranking
from distrl.train.ranker import RankingTask
from distrl.train.report import as_csv, as_json, length_table, main_table, picture
from distrl.train.saved import item_map, read_checkpoint, read_registered
from jobs.command import arguments, resolve, run


class EvaluateConfig(Config):
    """Which model, on which store, and where the figures go."""

    checkpoint_uri: str | None = None
    """Folder of a checkpoint, local or not."""
    model_uri: str | None = None
    """A registered model, models:/name/1 or models:/name@champion; either this or a checkpoint."""
    store_uri: str | None = None
    """The sequence store. None: the one that the checkpoint was trained on. On another one, items
    that the model does not know are misses."""
    split: Split = "test"
    output_uri: str = "evaluation"
    """Folder for evaluation-<split>.json, .csv and .png; under the sampled protocol they are
    evaluation-<split>-sampled99.json and so on."""
    top_k_uri: str | None = None
    """Empty or new folder for the best items of every user as Parquet; None writes none."""
    top_k: PositiveInt = 20
    """Items a user in top_k_uri."""
    top_k_mask_seen: bool = False
    """Leave out what the user's history holds."""
    evaluation: EvaluationConfig = EvaluationConfig()
    storage_uri: str = "runs"
    """Where runs are kept: decides the default tracking URI, as in training."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _one_model(self) -> "EvaluateConfig":
        if (self.checkpoint_uri is None) == (self.model_uri is None):
            raise ValueError(
                f"checkpoint_uri={self.checkpoint_uri} and model_uri={self.model_uri}: exactly one "
                "of them names the model; `model_uri=` empties the other"
            )
        if self.model_uri is not None and self.store_uri is None:
            raise ValueError("store_uri: a registered model does not say which store to rank")
        return self


@dataclass(frozen=True, slots=True)
class _Ready:
    """A model, and a store that was looked at."""

    artifact: Artifact
    store_uri: str
    num_shards: int
    item_map: Int64[np.ndarray, " items"] | None


def main() -> None:
    """Evaluates one model on one split."""
    config = resolve(EvaluateConfig, _arguments())
    logging.getLogger(progress.__name__).setLevel(logging.INFO)
    output_uri = absolute(config.output_uri)
    check_writable(output_uri)
    if config.top_k_uri is not None and listing(config.top_k_uri):
        raise ConfigError(f"top_k_uri={config.top_k_uri} is not empty; name a new folder")
    ready = _prepare(config)
    connect_for_ranking(config.evaluation, ready.num_shards)
    result = evaluate_model(
        ready.artifact.method,
        ready.artifact.catalog.max_len,
        ready.store_uri,
        config.split,
        config.evaluation,
        item_map=ready.item_map,
    )
    print(main_table(result), length_table(result), sep="\n\n", flush=True)
    said = {"model": config.model_uri or config.checkpoint_uri, "store": ready.store_uri}
    files = {
        "json": json.dumps({**said, **as_json(result)}, indent=1).encode(),
        "csv": as_csv(result).encode(),
        "png": picture(result),
    }
    for ending, content in files.items():
        uri = join(output_uri, f"{_file_name(config)}.{ending}")
        write_bytes(uri, content)
        print(uri)
    if config.top_k_uri is not None:
        _write_top_k(config, ready, absolute(config.top_k_uri))


def _arguments() -> argparse.Namespace:
    """What the command line says; the flag becomes an override, and the last one."""
    parser = arguments(__doc__, config_optional=True)
    parser.add_argument(
        "--protocol",
        choices=get_args(RankingProtocol),
        help="full: rank the whole catalog (the default); sampled99: rank the target among 99 "
        "random items new to the user, not comparable with full ranking. The same as "
        "evaluation.protocol=...",
    )
    args = parser.parse_intermixed_args()
    if args.protocol is not None:
        args.overrides = [*args.overrides, f"evaluation.protocol={args.protocol}"]
    return args


def _file_name(config: EvaluateConfig) -> str:
    """Figures of one protocol never lie in the file of another's."""
    protocol = config.evaluation.protocol
    return f"evaluation-{config.split}" + ("" if protocol == "full" else f"-{protocol}")


def _prepare(config: EvaluateConfig) -> _Ready:
    """Loads the model and looks at the store, before Ray starts."""
    if config.checkpoint_uri is not None:
        artifact, trained_on = read_checkpoint(absolute(config.checkpoint_uri))
        store_uri = absolute(config.store_uri or trained_on)
    else:
        assert config.model_uri is not None, "the config has one or the other"
        assert config.store_uri is not None, "the config checks it"
        tracking_uri = resolve_tracking_uri(config.tracking, config.storage_uri)
        artifact = read_registered(config.model_uri, tracking_uri)
        store_uri = absolute(config.store_uri)
    manifest = read_manifest(store_uri)
    check_sizes(store_uri, manifest)
    ids: pa.Array = read_item_ids(store_uri, manifest)
    mapped = item_map(artifact, ids)
    check_protocol(config.evaluation, manifest, store_uri, mapped)
    return _Ready(artifact, store_uri, len(manifest.sequences), mapped)


def _write_top_k(config: EvaluateConfig, ready: _Ready, target_uri: str) -> None:
    """Every user's best items, and last a file that says what they are."""
    task = RankingTask(
        max_len=ready.artifact.catalog.max_len,
        store_uri=ready.store_uri,
        split=config.split,
        config=config.evaluation,
        popularity=None,
        item_map=ready.item_map,
    )
    num_users = write_best_items(
        ready.artifact.method,
        task,
        ready.artifact.items,
        config.top_k,
        target_uri,
        mask_seen=config.top_k_mask_seen,
    )
    about = {
        "model": config.model_uri or config.checkpoint_uri,
        "store": ready.store_uri,
        "history": f"all before the {config.split} item",
        "k": config.top_k,
        "mask_seen": config.top_k_mask_seen,
        "num_users": num_users,
    }
    write_bytes(join(target_uri, "about.json"), json.dumps(about, indent=1).encode())
    print(f"{target_uri}: the best {config.top_k} items of {num_users:,} users")


if __name__ == "__main__":
    run(main)
