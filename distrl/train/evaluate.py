"""Ranking of a store's held-out items, in this process or on Ray actors.

The unit is a shard, what comes back from one is counts of ranks, and adding counts is exact: so
metrics do not depend on batch size, number of workers or sharding.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from distrl.contract import Method
from distrl.data.evaluation_config import EvaluationConfig, RankingProtocol
from distrl.data.store import read_manifest
from distrl.errors import ConfigError, SchemaError
from distrl.ops.metrics import RankCounts
from distrl.ops.negatives import NUM_NEGATIVES
from distrl.schema import PAD_ID, Manifest, Shard, Split
from distrl.train.baselines import count_training_items, popularity_ranks
from distrl.train.fleet import count_on_ray, ranking_fleet
from distrl.train.progress import Progress
from distrl.train.ranker import MODEL, POLICIES, Policy, Ranker, RankingTask, Tally
from distrl.train.sampled import shared_popularity_ranks
from distrl.train.top_k import write_top_k


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Ranks of a split's targets, counted for the model and for the baselines beside it."""

    split: Split
    protocol: RankingProtocol
    """What the targets were ranked against; figures of one say nothing beside those of another."""
    ranks: Mapping[str, RankCounts]
    """By `ranker/policy`; rankers are model, popularity and repeat_recent, policies kept and
    masked, or under `sampled99` that alone."""
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
    def policies(self) -> tuple[Policy, ...]:
        """How the targets were ranked."""
        return POLICIES[self.protocol]

    @property
    def metrics(self) -> dict[str, float]:
        """The model's: `kept/hr_at_5`, ..., `masked/mrr_at_20`; or `sampled99/hr_at_5`, ..."""
        return {
            f"{policy}/{name}": value
            for policy in self.policies
            for name, value in self.ranks[f"{MODEL}/{policy}"].metrics(self.cutoffs).items()
        }

    @property
    def by_length(self) -> list[dict[str, Any]]:
        """One row for each bucket of full sequence lengths, with the model's metrics."""
        found: dict[str, dict[str, Any]] = {}
        for policy in self.policies:
            buckets = self.ranks[f"{MODEL}/{policy}"].by_length(self.cutoffs)
            for label, num_users, metrics in buckets:
                row = found.setdefault(label, {"length": label, "num_users": num_users})
                row.update({f"{policy}/{name}": value for name, value in metrics.items()})
        return list(found.values())


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
    """Ranks the held-out item of every user against the whole catalog, or a sample of it.

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
        ConfigError: If the sampled protocol is asked for and the catalog is too small for it, as a
            whole or for some users, or the model does not know all of it.
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
    check_protocol(config, manifest, store_uri, item_map)
    shards = ranked_shards(manifest, split, config)
    progress = Progress(sum(shard.rows for shard in shards))
    popularity = None
    if baselines:
        popularity = _popularity(count_on_ray(store_uri, manifest, config), config)
    task = RankingTask(max_len, store_uri, split, config, popularity, item_map)
    with ranking_fleet(method, task, len(shards)) as fleet:
        return _result(fleet.rank(shards, progress.add), split, config, progress)


def ranked_shards(manifest: Manifest, split: Split, config: EvaluationConfig) -> tuple[Shard, ...]:
    """Shards of a split that are ranked: all, or the first that have `validation_users`."""
    wanted = config.validation_users
    if split != "validation" or wanted is None:
        return manifest.sequences
    before = accumulate((shard.rows for shard in manifest.sequences), initial=0)
    pairs = zip(manifest.sequences, before, strict=False)
    return tuple(shard for shard, users in pairs if users < wanted)


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
    check_protocol(config, manifest, store_uri, item_map)
    shards = ranked_shards(manifest, split, config)
    progress = Progress(sum(shard.rows for shard in shards))
    popularity = None
    if baselines:
        counted = (
            count_training_items(store_uri, shard, manifest.num_items)
            for shard in manifest.sequences
        )
        popularity = _popularity(reduce(add, counted), config)
    task = RankingTask(max_len, store_uri, split, config, popularity, item_map)
    ranker = Ranker(copy.deepcopy(method), task)
    tallies = (ranker.rank(shard, progress.add) for shard in shards)
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


def check_protocol(
    config: EvaluationConfig,
    manifest: Manifest,
    store_uri: str,
    item_map: Int64[np.ndarray, " items"] | None,
) -> None:
    """Refuses what the sampled protocol cannot rank, as far as the catalog alone shows it.

    Args:
        config: How to rank.
        manifest: The store's.
        store_uri: Where it is.
        item_map: As for `evaluate_model`.

    Raises:
        ConfigError: If the catalog has too few items, or the model does not know all of them.
    """
    if config.protocol != "sampled99":
        return
    if manifest.num_items <= NUM_NEGATIVES:
        raise ConfigError(
            f"evaluation.protocol=sampled99 ranks a target among {NUM_NEGATIVES} other items; the "
            f"store {store_uri} has {manifest.num_items} in all: use protocol=full"
        )
    num_unknown = 0 if item_map is None else int((item_map[PAD_ID + 1 :] == PAD_ID).sum())
    if num_unknown:
        raise ConfigError(
            f"evaluation.protocol=sampled99: the model does not know {num_unknown} items of the "
            f"store {store_uri}, so it cannot rank those that are drawn: use protocol=full"
        )


def _popularity(
    counts: Int64[np.ndarray, " items"], config: EvaluationConfig
) -> Int64[np.ndarray, " items"]:
    """Ranks of the items by popularity: under the sampled protocol equal counts tie."""
    if config.protocol == "sampled99":
        return shared_popularity_ranks(counts)
    return popularity_ranks(counts)


def _result(
    tallies: Iterable[Tally], split: Split, config: EvaluationConfig, progress: Progress
) -> EvaluationResult:
    total = reduce(add, tallies)
    if total.num_crowded:
        raise ConfigError(
            f"evaluation.protocol=sampled99 needs {NUM_NEGATIVES} items that are nowhere in a "
            f"user's sequence; {total.num_crowded:,} users have fewer left: use protocol=full"
        )
    num_users = total.ranks[f"{MODEL}/{POLICIES[config.protocol][0]}"].num_cases
    if num_users == 0:
        raise SchemaError(
            f"no user has a {split} case: all {total.num_skipped} sequences are too short"
        )
    return EvaluationResult(
        split=split,
        protocol=config.protocol,
        ranks=total.ranks,
        cutoffs=config.cutoffs,
        num_users=num_users,
        num_skipped=total.num_skipped,
        num_unknown=total.num_unknown,
        seconds=progress.seconds,
    )
