"""Whole, valid stores from Python lists, for tests of what reads them."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distrl.schema import MANIFEST_NAME, NUM_HELD_OUT, Manifest, Shard


def make_store(
    folder: Path,
    sequences: list[list[int]],
    *,
    num_shards: int = 2,
    row_group_rows: int = 100,
    num_items: int | None = None,
) -> Manifest:
    """Writes sequences of dense item ids; item i is the caller's `item-i`, users are numbers."""
    num_items = num_items or max(max(sequence) for sequence in sequences)
    (folder / "sequences").mkdir(parents=True)
    (folder / "items").mkdir()
    shards = []
    for number in range(num_shards):
        users = list(range(number, len(sequences), num_shards))
        part = [sequences[user] for user in users]
        table = pa.table(
            {
                "user": pa.array(users, pa.int64()),
                "items": pa.array(part, pa.list_(pa.int32())),
            }
        )
        name = f"sequences/part-{number:05d}.parquet"
        pq.write_table(table, folder / name, row_group_size=row_group_rows)
        targets = [max(len(sequence) - NUM_HELD_OUT - 1, 0) for sequence in part]
        shards.append(
            Shard(
                path=name,
                rows=len(part),
                tokens=sum(map(len, part)),
                trainable_rows=sum(count > 0 for count in targets),
                prefixes=sum(targets),
                **_measured(folder / name),
            )
        )
    counts = [0] * (num_items + 1)
    for item in (item for sequence in sequences for item in sequence):
        counts[item] += 1
    items = pa.table(
        {
            "item_id": pa.array(range(1, num_items + 1), pa.int32()),
            "item": [f"item-{i}" for i in range(1, num_items + 1)],
            "count": pa.array(counts[1:], pa.int64()),
        }
    )
    name = "items/part-00000.parquet"
    pq.write_table(items, folder / name)
    manifest = Manifest(
        prepare={},
        prepare_hash="0" * 64,
        num_users=len(sequences),
        num_items=num_items,
        num_interactions=sum(map(len, sequences)),
        user_type="int64",
        item_type="string",
        has_timestamps=False,
        sequences=tuple(shards),
        items=(Shard(path=name, rows=num_items, **_measured(folder / name)),),
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest


def _measured(path: Path) -> dict:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
