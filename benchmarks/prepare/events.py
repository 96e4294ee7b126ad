"""The job that every engine does, its input, and what all of them share."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MIN_INTERACTIONS = 5
NUM_CPUS = 2
NUM_PARTITIONS = 8


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


def count_rows(out: Path) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in out.rglob("*.parquet"))
