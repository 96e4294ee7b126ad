"""Ray actors that rank shards side by side, each holding the model once."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from jaxtyping import Int64
from ray.exceptions import RayTaskError
from torch import nn

from distrl.cluster import Need, check_capacity, connect
from distrl.contract import Method
from distrl.data.evaluation_config import EvaluationConfig
from distrl.errors import DistrlError
from distrl.schema import Manifest, Shard
from distrl.train.baselines import count_training_items
from distrl.train.ranker import Ranker, RankingTask, Tally, encoder_dtype
from distrl.train.top_k import write_top_k

logger = logging.getLogger(__name__)

SILENCE_S = 60.0
"""How long nothing may come back before the log says so."""


def ranking_need(config: EvaluationConfig, num_shards: int) -> Need:
    """What an evaluation takes from the cluster; that of a run takes one ranking task at least.

    Args:
        config: Of the evaluation.
        num_shards: To rank; no more workers are started.
    """
    each = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    return Need("ranking workers", each, max(min(config.num_workers, num_shards), 1))


def connect_for_ranking(config: EvaluationConfig, num_shards: int) -> None:
    """Connects this process to a Ray that can hold the workers; nothing where it has none.

    Args:
        config: Of the evaluation.
        num_shards: To rank.

    Raises:
        ConfigError: If the cluster cannot be reached, or is too small.
    """
    if config.num_workers == 0:
        return
    need = ranking_need(config, num_shards)
    connect(need.total("CPU"))
    keys = "num_workers, cpus_per_worker or gpus_per_worker"
    check_capacity([need], keys=f"evaluation's {keys}")


@dataclass(frozen=True, slots=True)
class Weights:
    """A method as a skeleton without weights, and its weights as arrays.

    Actors on one node read the arrays in place, in Ray's shared memory.
    """

    skeleton: Method
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, method: Method, dtype: torch.dtype) -> "Weights":
        """Takes a method apart; floating-point weights come in `dtype`."""
        state = method.state_dict(keep_vars=True)
        empty: dict[int, Any] = {}
        for tensor in state.values():
            hollow = torch.empty_like(tensor, device="meta")
            parameter = isinstance(tensor, nn.Parameter)
            empty[id(tensor)] = nn.Parameter(hollow, requires_grad=False) if parameter else hollow
        arrays = {
            name: tensor.detach()
            .to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            .numpy()
            for name, tensor in state.items()
        }
        return cls(copy.deepcopy(method, memo=empty), arrays)

    def method(self) -> Method:
        """The method, on the same memory as the arrays."""
        with warnings.catch_warnings():
            # Shared memory is read-only, and ranking writes no weights.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        self.skeleton.load_state_dict(tensors, assign=True)
        return self.skeleton


class RankingActor:
    """Fetches the model with its first shard, and ranks one shard after another.

    The references to `Weights` and the `RankingTask` come with every call, in a list so that Ray
    passes them on: an actor that starts again is empty, and what the constructor raises would
    reach the driver as a dead actor.
    """

    def __init__(self) -> None:
        self._ranker: Ranker | None = None

    def rank(self, shared: list[ray.ObjectRef], shard: Shard) -> tuple[Tally, int]:
        """Counts of one shard, and its users."""
        return self._ready(shared).rank(shard), shard.rows

    def write_top_k(
        self,
        shared: list[ray.ObjectRef],
        k: int,
        item_ids: pa.Array,
        target_uri: str,
        mask_seen: bool,
        shard: Shard,
    ) -> int:
        """Writes the k best items of each user of a shard, and returns how many users those are."""
        best = self._ready(shared).top(shard, k, mask_seen=mask_seen)
        return write_top_k(best, item_ids, target_uri, shard)

    def _ready(self, shared: list[ray.ObjectRef]) -> Ranker:
        if self._ranker is None:
            weights, task = ray.get(shared)
            torch.set_num_threads(max(1, int(task.config.cpus_per_worker)))
            self._ranker = Ranker(weights.method(), task)
        return self._ranker


@dataclass(frozen=True, slots=True)
class Fleet:
    """Actors, and the references that each call takes along."""

    actors: list[Any]
    shared: list[ray.ObjectRef]

    def rank(self, shards: Sequence[Shard], on_shard: Callable[[int], None]) -> Iterator[Tally]:
        """Counts of each shard, in the order in which actors are done with them."""
        starts = [partial(actor.rank.remote, self.shared) for actor in self.actors]
        for tally, num_users in each_shard(starts, shards):
            on_shard(num_users)
            yield tally

    def write_top_k(
        self,
        shards: Sequence[Shard],
        k: int,
        item_ids: pa.Array,
        target_uri: str,
        *,
        mask_seen: bool,
    ) -> int:
        """Lets the actors write the best items of all users; returns how many users it were."""
        ids = ray.put(item_ids)
        starts = [
            partial(actor.write_top_k.remote, self.shared, k, ids, target_uri, mask_seen)
            for actor in self.actors
        ]
        return sum(each_shard(starts, shards))


@contextmanager
def ranking_fleet(method: Method, task: RankingTask, num_shards: int) -> Iterator[Fleet]:
    """Actors that share the model, as many as are configured and have a shard to rank.

    A lost one starts again where there is room, and repeats its shard. All end with the block.
    """
    config = task.config
    actor_class: Any = ray.remote(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        max_restarts=-1,
        max_task_retries=-1,
    )(RankingActor)
    shared = [ray.put(Weights.of(method, encoder_dtype(config))), ray.put(task)]
    actors = [actor_class.remote() for _ in range(min(config.num_workers, num_shards))]
    try:
        yield Fleet(actors, shared)
    finally:
        for actor in actors:
            ray.kill(actor)


def count_on_ray(
    store_uri: str, manifest: Manifest, config: EvaluationConfig
) -> Int64[np.ndarray, " items"]:
    """Occurrences of each item in the training parts of a store, counted in Ray tasks."""
    count = ray.remote(num_cpus=config.cpus_per_worker)(count_training_items)
    width = min(config.num_workers, len(manifest.sequences))

    def start(shard: Shard) -> ray.ObjectRef:
        return count.remote(store_uri, shard, manifest.num_items)

    total = np.zeros(manifest.num_items + 1, dtype=np.int64)
    for counts in each_shard([start] * width, manifest.sequences):
        total += counts
    return total


def each_shard(
    submit: Sequence[Callable[[Shard], ray.ObjectRef]], shards: Sequence[Shard]
) -> Iterator[Any]:
    """Results of all shards as they come, each of `submit` busy with one at a time.

    Raises:
        DistrlError: What a worker raised, without Ray's wrapping.
    """
    idle, waiting = list(submit), list(reversed(shards))
    running: dict[ray.ObjectRef, Callable[[Shard], ray.ObjectRef]] = {}
    while waiting or running:
        while waiting and idle:
            worker = idle.pop()
            running[worker(waiting.pop())] = worker
        done, _ = ray.wait(list(running), timeout=SILENCE_S)
        if not done:
            logger.warning(
                "no shard ranked in %.0f s; the cluster has %s free",
                SILENCE_S,
                {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")},
            )
        for ref in done:
            idle.append(running.pop(ref))
            try:
                yield ray.get(ref)
            except RayTaskError as error:
                if isinstance(error.cause, DistrlError):
                    raise error.cause from None
                raise
