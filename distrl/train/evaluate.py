"""Full-catalog ranking of a store's held-out items, in this process or on Ray actors.

The unit is a shard, what comes back from one is counts of ranks, and adding counts is exact: so
metrics do not depend on batch size, number of workers or sharding.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from distrl.contract import Method
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.store import read_manifest
from distrl.errors import SchemaError
from distrl.ops.metrics import RankCounts
from distrl.schema import Manifest, Split
from distrl.train.baselines import count_training_items, popularity_ranks
from distrl.train.fleet import count_on_ray, ranking_fleet
from distrl.train.progress import Progress
from distrl.train.ranker import MODEL, Ranker, RankingTask, Tally
from distrl.train.top_k import write_top_k


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Ranks of a split's targets, counted for the model and for the baselines beside it."""

    split: Split
    ranks: Mapping[str, RankCounts]
    """By `ranker/policy`; rankers are model, popularity and repeat_recent, policies kept and
    masked."""
    cutoffs: tuple[int, ...]
    num_users: int
    """Cases: users with a target and a history, each counted in every metric."""
    num_skipped: int
    """Users too short for a case."""
    num_unknown: int
    """Cases that are misses because the target, or all of the history, is not in the model's
    catalog."""
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The model's: `kept/hr_at_5`, ..., `masked/mrr_at_20`."""
        return {
            f"{policy}/{name}": value
            for policy in ("kept", "masked")
            for name, value in self.ranks[f"{MODEL}/{policy}"].metrics(self.cutoffs).items()
        }

    @property
    def by_length(self) -> list[dict[str, Any]]:
        """One row for each bucket of full sequence lengths, with the model's metrics."""
        kept, masked = (
            self.ranks[f"{MODEL}/{policy}"].by_length(self.cutoffs) for policy in ("kept", "masked")
        )
        return [
            {
                "length": label,
                "num_users": num_users,
                **{f"kept/{name}": value for name, value in kept_metrics.items()},
                **{f"masked/{name}": value for name, value in masked_metrics.items()},
            }
            for (label, num_users, kept_metrics), (_, _, masked_metrics) in zip(
                kept, masked, strict=True
            )
        ]


def evaluate_model(
    method: Method,
    max_len: int,
    store_uri: str,
    split: Split,
    config: EvaluationConfig,
    *,
    item_map: Int64[np.ndarray, " items"] | None = None,
    baselines: bool = True,
) -> EvaluationResult:
    """Ranks the held-out item of every user against the whole catalog.

    Each of `config.num_workers` Ray actors holds the model once and takes shard after shard; with
    0 workers the same numbers come from `evaluate_local`.

    Args:
        method: The model; it is copied, never changed.
        max_len: Newest items of a history that the model reads.
        store_uri: The sequence store.
        split: `validation` or `test`.
        config: Cutoffs, chunk sizes, workers.
        item_map: For a model trained on another store: its item id for each item id of this one,
            0 where it does not know the item.
        baselines: Whether to rank popularity and repeat-recent too; costs a pass over the store.

    Raises:
        SchemaError: If the store is torn, or its catalog is not the model's and no map is given.
        StorageError: If the store cannot be read.
        DivergedError: If the model is not finite.
    """
    if config.num_workers == 0:
        return evaluate_local(
            method, max_len, store_uri, split, config, item_map=item_map, baselines=baselines
        )
    manifest = read_manifest(store_uri)
    _check_catalog(method, manifest, store_uri, item_map)
    progress = Progress(manifest.num_users)
    popularity = None
    if baselines:
        popularity = popularity_ranks(count_on_ray(store_uri, manifest, config))
    task = RankingTask(max_len, store_uri, split, config, popularity, item_map)
    with ranking_fleet(method, task, len(manifest.sequences)) as fleet:
        return _result(fleet.rank(manifest.sequences, progress.add), split, config, progress)


def evaluate_local(
    method: Method,
    max_len: int,
    store_uri: str,
    split: Split,
    config: EvaluationConfig,
    *,
    item_map: Int64[np.ndarray, " items"] | None = None,
    baselines: bool = True,
) -> EvaluationResult:
    """The same numbers as `evaluate_model`, in this process and without Ray."""
    manifest = read_manifest(store_uri)
    _check_catalog(method, manifest, store_uri, item_map)
    progress = Progress(manifest.num_users)
    popularity = None
    if baselines:
        counted = (
            count_training_items(store_uri, shard, manifest.num_items)
            for shard in manifest.sequences
        )
        popularity = popularity_ranks(reduce(add, counted))
    task = RankingTask(max_len, store_uri, split, config, popularity, item_map)
    ranker = Ranker(copy.deepcopy(method), task)
    tallies = (ranker.rank(shard, progress.add) for shard in manifest.sequences)
    return _result(tallies, split, config, progress)


def write_best_items(
    method: Method,
    task: RankingTask,
    item_ids: pa.Array,
    k: int,
    target_uri: str,
    *,
    mask_seen: bool,
) -> int:
    """Writes the k best items of every user as Parquet, a file for each shard of the store.

    Args:
        method: The model; it is copied, never changed.
        task: Which store, and after which history; a user without one known to the model has none.
        item_ids: The caller's own ids: index i holds that of the model's item i + 1.
        k: Items a user.
        target_uri: Folder of the files.
        mask_seen: Leave out the items of the history.

    Returns:
        Users written.

    Raises:
        SchemaError: If the store is torn.
        StorageError: If the store cannot be read, or the target not be written.
    """
    shards = read_manifest(task.store_uri).sequences
    if task.config.num_workers == 0:
        ranker = Ranker(copy.deepcopy(method), task)
        tops = (ranker.top(shard, k, mask_seen=mask_seen) for shard in shards)
        return sum(
            write_top_k(top, item_ids, target_uri, shard)
            for top, shard in zip(tops, shards, strict=True)
        )
    with ranking_fleet(method, task, len(shards)) as fleet:
        return fleet.write_top_k(shards, k, item_ids, target_uri, mask_seen=mask_seen)


def _check_catalog(
    method: Method,
    manifest: Manifest,
    store_uri: str,
    item_map: Int64[np.ndarray, " items"] | None,
) -> None:
    known = method.item_vectors.shape[0] - 1
    if item_map is None and known != manifest.num_items:
        raise SchemaError(
            f"the model knows {known} items and the store {store_uri} has {manifest.num_items}: "
            "they are of different catalogs, so item ids must be mapped"
        )
    if item_map is not None and (
        len(item_map) != manifest.num_items + 1 or item_map.max(initial=0) > known
    ):
        raise SchemaError(
            f"the item map has {len(item_map)} entries up to {item_map.max(initial=0)}; the store "
            f"{store_uri} needs {manifest.num_items + 1} and the model knows items 0..{known}"
        )


def _result(
    tallies: Iterable[Tally], split: Split, config: EvaluationConfig, progress: Progress
) -> EvaluationResult:
    total = reduce(add, tallies)
    num_users = total.ranks[f"{MODEL}/kept"].num_cases
    if num_users == 0:
        raise SchemaError(
            f"no user has a {split} case: all {total.num_skipped} sequences are too short"
        )
    return EvaluationResult(
        split=split,
        ranks=total.ranks,
        cutoffs=config.cutoffs,
        num_users=num_users,
        num_skipped=total.num_skipped,
        num_unknown=total.num_unknown,
        seconds=progress.seconds,
    )
