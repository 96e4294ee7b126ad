"""Histories that end with an item, a few for each item, out of one pass over a store.

Of all windows of two items or more that end with an item those stay whose draw is lowest. A draw
comes from the seed and the items shown, so shards and their order do not change what is drawn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
from jaxtyping import Int32, UInt64

from distrl.data.histories import read_histories
from distrl.data.ray_stage import Stage, fetch, run_tasks
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, seed_key
from distrl.ops.windows import windows_of
from distrl.schema import Manifest, Shard
from distrl.semantics.describe_config import DescribeConfig


class Examples(NamedTuple):
    """Histories ascending by their last item and then by their draw."""

    items: Int32[np.ndarray, "rows shown"]
    """Oldest first, padded with 0 on the left."""
    draws: UInt64[np.ndarray, " rows"]

    def of(self, item: int) -> list[list[int]]:
        """Those that end with an item."""
        first, end = np.searchsorted(self.items[:, -1], [item, item + 1])
        return [row[row > 0].tolist() for row in self.items[first:end]]


def no_examples(example_len: int) -> Examples:
    """None for any item."""
    return Examples(np.zeros((0, example_len), np.int32), np.zeros(0, np.uint64))


def examples_of(sequences: Ragged, example_len: int, seed: int, *, held_out: bool) -> Examples:
    """All histories of some users that end with an item, in no order.

    Args:
        sequences: The users' histories, held-out items included.
        example_len: Items of a history at most.
        seed: Of the draws.
        held_out: Also those that end with a validation target, as SRA-CL's code has it.
    """
    windows = windows_of(sequences.lengths, "every", held_out=held_out)
    long = windows.length > 1
    rows, lengths = windows.row[long], windows.length[long]
    back = np.arange(example_len - 1, -1, -1)
    places = (sequences.offsets[rows] + lengths - 1)[:, None] - back
    there = back < lengths[:, None]
    items = np.where(there, sequences.values[np.where(there, places, 0)], 0)
    draws = np.repeat(seed_key(seed), len(items))
    for column in items.T:
        draws = mixed(draws, column)
    return Examples(items.astype(np.int32), draws)


def lowest(examples: list[Examples], count: int) -> Examples:
    """The `count` with the lowest draw of each item, in order."""
    items = np.concatenate([part.items for part in examples])
    draws = np.concatenate([part.draws for part in examples])
    order = np.lexsort((draws, items[:, -1]))
    items, draws = items[order], draws[order]
    firsts = np.searchsorted(items[:, -1], items[:, -1])
    kept = np.arange(len(items)) - firsts < count
    return Examples(items[kept], draws[kept])


def find_examples(
    config: DescribeConfig, manifest: Manifest, say: Callable[[str], None]
) -> Examples:
    """Examples for all items of a store: a Ray task a shard, a merge of two at a time here.

    Takes up to num_examples * (4 * example_len + 8) bytes an item.

    Raises:
        SchemaError: If a shard is not what the manifest says.
        StorageError: If it cannot be read.
    """
    limit = config.num_cpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = partial(_shard_examples.remote, config, manifest.num_items)
    launches = [partial(task, shard) for shard in manifest.sequences]
    with Stage("find examples", len(launches), say) as stage:
        finished = run_tasks(launches, limit, stage, int)
    found = no_examples(config.prompts.example_len)
    while finished:
        _, (reference,) = finished.pop()
        found = lowest([found, fetch(reference)], config.prompts.num_examples)
    return found


@ray.remote(num_returns=2)
def _shard_examples(config: DescribeConfig, num_items: int, shard: Shard) -> Any:  # noqa: ANN401
    """How many users a shard has, and its examples."""
    prompts = config.prompts
    found, rows = no_examples(prompts.example_len), 0
    for first, histories in read_histories(config.store_uri, shard, num_items):
        new = examples_of(
            histories, prompts.example_len, prompts.example_seed, held_out=config.held_out
        )
        found = lowest([found, new], prompts.num_examples)
        rows = first + len(histories.lengths)
    return rows, found
