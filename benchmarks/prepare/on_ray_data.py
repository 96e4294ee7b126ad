"""Ray Data's hash shuffle."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.aggregate import Count

from benchmarks.prepare.events import MIN_INTERACTIONS, NUM_PARTITIONS, count_rows, sequences


def with_ray_data(folder: Path, out: Path) -> int:
    ray.data.DataContext.get_current().enable_progress_bars = False
    events = ray.data.read_parquet(str(folder))
    items = events.groupby("item", num_partitions=NUM_PARTITIONS).aggregate(
        Count(alias_name="count")
    )
    items = items.filter(lambda row: row["count"] >= MIN_INTERACTIONS)
    items = items.sort(["count", "item"], descending=[True, False]).materialize()
    numbered, first = [], 1
    for reference in items.to_arrow_refs():
        numbered.append(_number.remote(reference, first))
        first += ray.get(_num_rows.remote(reference))
    ids = ray.data.from_arrow_refs(numbered)
    # Ray Data's own join needs polars; a union shuffled by the item does the same without it.
    events = events.map_batches(_like_ids, batch_format="pyarrow")
    joined = events.union(ids).repartition(NUM_PARTITIONS, keys=["item"])
    joined = joined.map_batches(_look_up, batch_format="pyarrow", batch_size=None)
    by_user = joined.repartition(NUM_PARTITIONS, keys=["user"])
    kept = by_user.map_batches(_active_users, batch_format="pyarrow", batch_size=None)
    kept.map_batches(sequences, batch_format="pyarrow", batch_size=None).write_parquet(str(out))
    return count_rows(out)


def _like_ids(events: pa.Table) -> pa.Table:
    return events.append_column("item_id", pa.nulls(events.num_rows, pa.int32()))


def _look_up(block: pa.Table) -> pa.Table:
    known = pc.is_valid(block["item_id"])
    ids, events = block.filter(known), block.filter(pc.invert(known))
    place = pc.index_in(events["item"], ids["item"])
    events = events.drop_columns("item_id").append_column("item_id", ids["item_id"].take(place))
    return events.filter(pc.is_valid(events["item_id"]))


def _active_users(events: pa.Table) -> pa.Table:
    users = events["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    return events.filter(pa.array(np.bincount(users)[users] >= MIN_INTERACTIONS))


@ray.remote
def _number(block: pa.Table, first: int) -> pa.Table:
    ids = pa.array(np.arange(first, first + block.num_rows, dtype=np.int32))
    nothing = pa.nulls(block.num_rows, pa.int64())
    return pa.table({"user": nothing, "item": block["item"], "timestamp": nothing, "item_id": ids})


@ray.remote
def _num_rows(block: pa.Table) -> int:
    return block.num_rows
