"""Whole histories of a shard, held-out items included, some users at a time."""

from collections.abc import Generator

import pyarrow as pa
import pyarrow.parquet as pq

from distrl import storage
from distrl.data.ragged_columns import to_ragged
from distrl.data.store import verify_shard
from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.schema import Shard

USERS_AT_ONCE = 1024


def read_histories(
    store_uri: str, shard: Shard, num_items: int, *, verify: bool = True
) -> Generator[tuple[int, Ragged], None, None]:
    """The row of the first user, and the histories, of each piece of a shard.

    Args:
        store_uri: The store.
        shard: Of its sequences.
        num_items: Of its catalog.
        verify: Compare the shard with its checksum first; costs one more read of it.

    Raises:
        SchemaError: If the shard is not what the manifest says.
        StorageError: If it cannot be read.
    """
    if verify:
        verify_shard(store_uri, shard)
    uri, row = storage.join(store_uri, shard.path), 0
    try:
        with storage.open_input(uri) as source:
            for batch in pq.ParquetFile(source).iter_batches(USERS_AT_ONCE, columns=["items"]):
                whole = to_ragged(pa.chunked_array([batch.column("items")]))
                items = whole.values
                if len(items) and not 1 <= items.min() <= items.max() <= num_items:
                    raise SchemaError(
                        f"shard {uri} holds items {items.min()} to {items.max()}, its manifest "
                        f"says 1 to {num_items}; prepare the store again"
                    )
                yield row, whole
                row += batch.num_rows
    except OSError as error:
        raise storage.explained(uri, "read", error) from error
