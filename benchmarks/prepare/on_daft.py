"""Daft on Ray."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray

from benchmarks.prepare.events import MIN_INTERACTIONS, NUM_PARTITIONS, count_rows, sequences


@ray.remote
def _write_sequences(partition, path: str) -> None:
    rows = partition.to_arrow()
    if rows.num_rows:
        pq.write_table(sequences(rows), path)


def with_daft(folder: Path, out: Path, algorithm: str | None) -> int:
    # Daft reports its use over the network unless told not to.
    os.environ["DAFT_ANALYTICS_ENABLED"] = "0"
    import daft
    from daft import col

    daft.set_runner_ray()
    daft.set_execution_config(shuffle_algorithm=algorithm)
    events = daft.read_parquet(f"{folder}/*.parquet")
    items = events.groupby("item").agg(col("item").count().alias("count"))
    items = items.where(col("count") >= MIN_INTERACTIONS)
    items = items.sort(["count", "item"], desc=[True, False])
    items = items._add_monotonically_increasing_id("place").collect()
    # A place is (partition << 36) + row: the driver sees one row a partition.
    sizes = items.with_column("part", (col("place") // (1 << 36)).cast("int64"))
    sizes = sizes.groupby("part").agg(col("item").count().alias("rows")).sort("part").to_pydict()
    firsts = np.concatenate([[0], np.cumsum(sizes["rows"])[:-1]]) + 1
    first_ids = daft.from_pydict({"part": sizes["part"], "first": firsts.tolist()})
    ids = items.with_column("part", (col("place") // (1 << 36)).cast("int64")).join(
        first_ids, on="part"
    )
    ids = ids.select(
        col("item"),
        (col("first") + col("place").cast("int64") % (1 << 36)).cast("int32").alias("item_id"),
    )
    joined = events.join(ids, on="item", strategy="hash")
    users = joined.groupby("user").agg(col("item").count().alias("length"))
    users = users.where(col("length") >= MIN_INTERACTIONS).select("user")
    kept = joined.join(users, on="user", how="semi", strategy="hash")
    out.mkdir(parents=True)
    ray.get(
        [
            _write_sequences.remote(partition, f"{out}/part-{number:03d}.parquet")
            for number, partition in enumerate(
                kept.repartition(NUM_PARTITIONS, "user").iter_partitions()
            )
        ]
    )
    return count_rows(out)
