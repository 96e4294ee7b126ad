"""Which engine should prepare raw events: Ray Data's hash shuffle, Daft on Ray, or plain Ray tasks?

    python benchmarks/prepare_engines.py generate FOLDER NUM_EVENTS
    python benchmarks/prepare_engines.py {ray_data,daft,daft_flight,distrl} FOLDER OUT

Each does the same: drop items, then users, with fewer than 5 interactions; number the items by
falling count; one time-ordered list a user; Parquet. No step brings events or the id map to the
driver. `distrl` is `distrl.data.prepare` itself, which besides checks every row, keeps input order
between equal times, shuffles users by a hash and writes checksums. One JSON line is printed: wall
and CPU seconds of the whole tree of processes, and their peak proportional memory (PSS).
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

MIN_INTERACTIONS = 5
NUM_CPUS = 2
NUM_PARTITIONS = 8
OBJECT_STORE_BYTES = 1_500_000_000


def generate(folder: Path, num_events: int, num_files: int = 20) -> None:
    """Users of very different activity, items by a Zipf law, times at random."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    num_users, num_items, rows = num_events // 12, 200_000, num_events // num_files
    for number in range(num_files):
        users = (num_users * rng.random(rows) ** 1.7).astype(np.int64)
        ranks = np.minimum(rng.zipf(1.15, rows) - 1, 10**12)
        table = {
            "user": users * 7 + 3,
            "item": (ranks * 2654435761) % num_items,
            "timestamp": rng.integers(1_500_000_000, 1_700_000_000, rows),
        }
        pq.write_table(pa.table(table), folder / f"events-{number:03d}.parquet")


def sequences(rows: pa.Table) -> pa.Table:
    """One time-ordered list a user."""
    rows = rows.select(["user", "item_id", "timestamp"]).sort_by(
        [("user", "ascending"), ("timestamp", "ascending")]
    )
    users = rows["user"].to_numpy()
    starts = np.flatnonzero(np.diff(users, prepend=users[:1] - 1))
    offsets = pa.array(np.append(starts, len(users)), pa.int32())
    return pa.table(
        {
            "user": users[starts],
            "items": pa.ListArray.from_arrays(offsets, rows["item_id"].combine_chunks()),
            "timestamps": pa.ListArray.from_arrays(offsets, rows["timestamp"].combine_chunks()),
        }
    )


def with_ray_data(folder: Path, out: Path) -> int:
    import ray.data
    from ray.data.aggregate import Count

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


def with_distrl(folder: Path, out: Path) -> int:
    from distrl.data.prepare import prepare
    from distrl.data.prepare_config import KCoreConfig, PrepareConfig, SourceConfig

    core = KCoreConfig(
        min_user_interactions=MIN_INTERACTIONS, min_item_interactions=MIN_INTERACTIONS, rounds=1
    )
    config = PrepareConfig(store_uri=str(out), source=SourceConfig(uri=str(folder)), k_core=core)
    return prepare(config, say=print).num_users


def count_rows(out: Path) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in out.rglob("*.parquet"))


class Watch(threading.Thread):
    """Peak PSS of this process and all below it, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.cpu_s: dict[int, float] = {}

    def run(self) -> None:
        """Looks until the program ends."""
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        """Adds up memory and CPU time at this moment."""
        total, this = 0, psutil.Process()
        for process in [this, *this.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
                times = process.cpu_times()
                self.cpu_s[process.pid] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.peak_bytes = max(self.peak_bytes, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["generate", "ray_data", "daft", "daft_flight", "distrl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("last", help="NUM_EVENTS for generate, else the output folder")
    args = parser.parse_args()
    if args.what == "generate":
        generate(args.folder, int(args.last))
        return
    folder, out = args.folder.resolve(), Path(args.last).resolve()
    shutil.rmtree(out, ignore_errors=True)
    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory(prefix="engines-", dir="/tmp") as temporary:
        ray.init(
            address="local",
            num_cpus=NUM_CPUS,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=temporary,
        )
        watch.look()
        before_s, start = sum(watch.cpu_s.values()), time.monotonic()
        if args.what == "ray_data":
            users = with_ray_data(folder, out)
        elif args.what == "distrl":
            users = with_distrl(folder, out)
        else:
            users = with_daft(folder, out, "flight_shuffle" if "_" in args.what else None)
        wall_s = time.monotonic() - start
        watch.look()
        result = {
            "engine": args.what,
            "users": users,
            "wall_s": round(wall_s, 1),
            "cpu_s": round(sum(watch.cpu_s.values()) - before_s, 1),
            "peak_pss_gb": round(watch.peak_bytes / 1e9, 2),
        }
        print(json.dumps(result), flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
