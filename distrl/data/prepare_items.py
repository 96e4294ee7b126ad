"""The stages of a prepare that look at items: k-core rounds and dense ids."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from ray import ObjectRef

from distrl.data import prepare_tasks as tasks
from distrl.data.dense_ids import choose_splitters
from distrl.data.prepare_config import KCoreConfig
from distrl.data.ray_stage import Stage, run_tasks

_PARTITIONS_PER_BUCKET = 8
"""A bucket of items is about as large as a partition, of which items are a small share."""


@dataclass(frozen=True)
class Work:
    """Partitions between two stages, as references."""

    partitions: list[ObjectRef]
    counts: list[list[ObjectRef]]
    """For each partition, its item counts by bucket."""
    sizes: list[tasks.Size]

    @classmethod
    def of(cls, finished: list[tuple[tasks.Size, list[ObjectRef]]]) -> "Work":
        """What tasks left that return a size, a partition and its counts; empty ones go."""
        whole = [(size, refs) for size, refs in finished if size.interactions]
        return cls(
            partitions=[refs[0] for _, refs in whole],
            counts=[refs[1:] for _, refs in whole],
            sizes=[size for size, _ in whole],
        )

    @property
    def users(self) -> int:
        """All users left."""
        return sum(size.users for size in self.sizes)

    @property
    def interactions(self) -> int:
        """All interactions left."""
        return sum(size.interactions for size in self.sizes)

    @property
    def longest(self) -> int:
        """Interactions of the user who has most."""
        return max((size.longest for size in self.sizes), default=0)

    def by_bucket(self) -> list[list[ObjectRef]]:
        """For each bucket of items, the counts of all partitions."""
        return [list(bucket) for bucket in zip(*self.counts, strict=True)]


def num_buckets(num_partitions: int) -> int:
    """Buckets of items beside a number of partitions of users."""
    return math.ceil(num_partitions / _PARTITIONS_PER_BUCKET)


def k_core(
    work: Work,
    config: KCoreConfig,
    limit: int,
    say: Callable[[str], None],
    left: Callable[[str, int], None],
) -> Work:
    """The work without rare items and users, after the configured rounds or at the fixed point.

    Args:
        work: Partitions to shrink.
        config: Minimums and rounds.
        limit: Most tasks at a time.
        say: Told of progress.
        left: Told after each round how many interactions are left; raises if none may be.
    """
    if config.min_user_interactions == 1 and config.min_item_interactions == 1:
        return work
    number, before = 0, (-1, -1)
    while (config.rounds is None or number < config.rounds) and before != (
        work.users,
        work.interactions,
    ):
        number += 1
        before = work.users, work.interactions
        with Stage(f"k-core round {number}", len(work.counts[0]) + len(work.sizes), say) as stage:
            work = _k_core_round(work, config, limit, stage)
        left(f"after k_core round {number}", work.interactions)
    return work


def _k_core_round(work: Work, config: KCoreConfig, limit: int, stage: Stage) -> Work:
    rare = tasks.find_rare.options(num_returns=2).remote
    launches = [partial(rare, config.min_item_interactions, *counts) for counts in work.by_bucket()]
    removed = [refs[0] for _, refs in run_tasks(launches, limit, stage, lambda rows: 0)]
    shrink = tasks.shrink_partition.options(num_returns=2 + len(removed)).remote
    launches = [
        partial(shrink, reference, removed, config.min_user_interactions)
        for reference in work.partitions
    ]
    return Work.of(run_tasks(launches, limit, stage, lambda size: size.interactions))


@dataclass(frozen=True)
class NumberedItems:
    """All items with their dense ids, as references."""

    ranges: list[tuple[int, ObjectRef]]
    """Rows and table of each range of ids, in order."""
    by_bucket: list[ObjectRef]
    """The same rows by bucket of the item's hash."""

    @property
    def num_items(self) -> int:
        """All items."""
        return sum(rows for rows, _ in self.ranges)

    def rows(self, start: int, count: int) -> list[tuple[ObjectRef, int, int]]:
        """Slices (reference, first row, rows) that together are `count` rows from `start` on."""
        slices, begin = [], 0
        for rows, reference in self.ranges:
            first, last = max(start, begin), min(start + count, begin + rows)
            if first < last:
                slices.append((reference, first - begin, last - first))
            begin += rows
        return slices


def number_items(work: Work, limit: int, say: Callable[[str], None]) -> NumberedItems:
    """Dense ids 1..V by falling count, ties by the caller's id ascending."""
    counts = work.by_bucket()
    buckets = len(counts)
    with Stage("number items", 4 * buckets, say) as stage:
        order = tasks.order_bucket.options(num_returns=2).remote
        ordered = run_tasks([partial(order, *refs) for refs in counts], limit, stage, lambda _: 0)
        samples = [row for sample, _ in ordered for row in sample]
        splitters = choose_splitters(samples, buckets)
        split = tasks.split_bucket.options(num_returns=2 + len(splitters)).remote
        launches = [partial(split, refs[0], splitters) for _, refs in ordered]
        parts = run_tasks(launches, limit, stage, lambda _: 0)
        rows = [sum(of_range) for of_range in zip(*(sizes for sizes, _ in parts), strict=True)]
        firsts = accumulate(rows[:-1], initial=1)
        by_range = zip(*(refs for _, refs in parts), strict=True)
        number = tasks.number_range.options(num_returns=2 + buckets).remote
        launches = [
            partial(number, first, buckets, *refs)
            for first, refs in zip(firsts, by_range, strict=True)
        ]
        numbered = run_tasks(launches, limit, stage, lambda rows: rows)
        join = tasks.join_tables.options(num_returns=2).remote
        by_bucket = zip(*(refs[1:] for _, refs in numbered), strict=True)
        launches = [partial(join, *refs) for refs in by_bucket]
        joined = run_tasks(launches, limit, stage, lambda _: 0)
    return NumberedItems(
        ranges=[(rows, refs[0]) for rows, refs in numbered],
        by_bucket=[refs[0] for _, refs in joined],
    )
