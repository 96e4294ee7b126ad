"""The best items of every user as Parquet, in the caller's own ids."""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrl.schema import PAD_ID, Shard
from distrl.storage import join, write_bytes
from distrl.train.ranker import TopItems


def write_top_k(best: Iterator[TopItems], item_ids: pa.Array, target_uri: str, shard: Shard) -> int:
    """Writes one file for a shard: user, items, scores, the best item first.

    Args:
        best: Items of the shard's users.
        item_ids: The caller's own ids: index i holds that of the model's item i + 1.
        target_uri: Folder of the files; this one is named like the shard.
        shard: Whose users they are.

    Returns:
        Users written. Those without a history that the model knows are left out; a shard of none
        but such users leaves no file.

    Raises:
        StorageError: If the target cannot be written.
    """
    num_users, tables = 0, (_table(batch, item_ids) for batch in best)
    first = next(tables, None)
    if first is None:
        return 0
    # In memory until it is whole: a reader never meets a part of a file.
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, first.schema, compression="zstd") as writer:
        while first is not None:
            writer.write_table(first)
            num_users += first.num_rows
            first = next(tables, None)
    write_bytes(join(target_uri, PurePosixPath(shard.path).name), buffer.getvalue())
    return num_users


def _table(best: TopItems, item_ids: pa.Array) -> pa.Table:
    there = best.items != PAD_ID
    offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(axis=1))]), type=pa.int32())
    items = item_ids.take(pa.array(best.items[there] - PAD_ID - 1))
    return pa.table(
        {
            "user": best.users,
            "items": pa.ListArray.from_arrays(offsets, items),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(best.scores[there])),
        }
    )
