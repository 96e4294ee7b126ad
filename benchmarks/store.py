"""The data that the benchmarks train on: Beauty, or something of its shape."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from distrl.data.store_writer import write_items, write_sequences
from distrl.schema import MANIFEST_NAME, Manifest

BEAUTY = "data/stores/beauty"
LIKE_BEAUTY = "data/stores/like-beauty"
NUM_USERS, NUM_ITEMS, NUM_SHARDS = 22_363, 12_101, 8
MIN_LENGTH, MEAN_LENGTH, MAX_LENGTH = 5, 8.9, 200
"""Beauty's; lengths above the minimum fall off geometrically."""


def training_store() -> tuple[str, str]:
    """The store to train on, and a sentence about it; one is generated where Beauty is missing."""
    if Path(BEAUTY, MANIFEST_NAME).exists():
        return BEAUTY, f"Data: Amazon Beauty, {BEAUTY}."
    if not Path(LIKE_BEAUTY, MANIFEST_NAME).exists():
        generate(LIKE_BEAUTY)
    return LIKE_BEAUTY, (
        f"Data: GENERATED, {NUM_USERS:,} users and {NUM_ITEMS:,} Zipf items as in Beauty, because "
        f"there is no {BEAUTY}; `python jobs/prepare.py configs/prepare/beauty.yaml` makes it."
    )


def generate(store_uri: str, *, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS) -> Manifest:
    """Writes a store of random sequences: Zipf items, lengths like Beauty's."""
    rng = np.random.default_rng(0)
    extra = rng.geometric(1 / (MEAN_LENGTH - MIN_LENGTH + 1), num_users) - 1
    lengths = np.minimum(MIN_LENGTH + extra, MAX_LENGTH)
    shares = 1 / np.arange(1, num_items + 1)
    drawn = rng.choice(num_items, lengths.sum(), p=shares / shares.sum())
    counts = np.bincount(drawn, minlength=num_items)
    by_count = np.argsort(-counts, kind="stable")
    item_id = np.empty(num_items, np.int32)
    item_id[by_count] = np.arange(1, num_items + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(offsets, pa.array(item_id[drawn]))
    users = pa.table({"user": pa.array(np.arange(num_users)), "items": lists})
    per_shard = -(-num_users // NUM_SHARDS)
    written = [
        write_sequences(
            store_uri,
            shard,
            [users.slice(shard * per_shard, per_shard)],
            row_group_rows=1024,
            row_group_bytes=16 << 20,
        )
        for shard in range(NUM_SHARDS)
    ]
    items = {
        "item_id": pa.array(np.arange(1, num_items + 1), pa.int32()),
        "item": pa.array(by_count),
        "count": pa.array(counts[by_count]),
    }
    manifest = Manifest(
        prepare={"generated": True},
        prepare_hash="0" * 64,
        num_users=num_users,
        num_items=num_items,
        num_interactions=int(lengths.sum()),
        user_type="int64",
        item_type="int64",
        has_timestamps=False,
        sequences=tuple(shard for shard in written if shard is not None),
        items=(write_items(store_uri, 0, pa.table(items)),),
    )
    Path(store_uri, MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1))
    return manifest
