"""Polars in memory, its lazy engine with as many threads as the others have CPUs."""

import os
from pathlib import Path

from benchmarks.prepare.events import MIN_INTERACTIONS, NUM_CPUS, count_rows

# Read once, when polars is imported.
os.environ["POLARS_MAX_THREADS"] = str(NUM_CPUS)

import polars as pl


def with_polars(folder: Path, out: Path) -> int:
    """The whole log as one frame."""
    events = pl.scan_parquet(f"{folder}/*.parquet")
    ids = (
        events.group_by("item")
        .len("count")
        .filter(pl.col("count") >= MIN_INTERACTIONS)
        .sort(["count", "item"], descending=[True, False])
        .with_row_index("item_id", offset=1)
        .select("item", pl.col("item_id").cast(pl.Int32))
    )
    lists = (
        events.join(ids, on="item")
        .filter(pl.len().over("user") >= MIN_INTERACTIONS)
        .sort("user", "timestamp")
        .group_by("user", maintain_order=True)
        .agg(pl.col("item_id").alias("items"), pl.col("timestamp").alias("timestamps"))
    )
    out.mkdir(parents=True)
    lists.collect().write_parquet(out / "part-000.parquet")
    return count_rows(out)
