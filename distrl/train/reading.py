"""Shards of a sequence store as ragged arrays, a bounded batch at a time."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrl.data.store import verify_shard
from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.schema import Shard
from distrl.storage import explained, join, open_input


def ragged(items: pa.ListArray) -> Ragged:
    """Rows of an Arrow list column."""
    offsets = items.offsets.to_numpy().astype(np.int64)
    values = items.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return Ragged(values, offsets - offsets[0])


def shard_batches(
    store_uri: str, shard: Shard, batch_size: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Columns of a shard, `batch_size` users at a time; a row group at most is in memory.

    Raises:
        SchemaError: If the shard is not readable Parquet, lacks a column, or is not of the
            manifest's length.
        StorageError: If it is missing, forbidden or unreachable.
    """
    uri = join(store_uri, shard.path)
    num_rows = 0
    try:
        with open_input(uri) as source:
            file = pq.ParquetFile(source)
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise SchemaError(
                        f"shard {uri} has no column {column}; it has "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
            for batch in file.iter_batches(batch_size, columns=list(columns)):
                num_rows += batch.num_rows
                yield batch
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"shard {uri} is torn or no Parquet file ({str(error).splitlines()[0]}); prepare the "
            "store again"
        ) from error
    except OSError as error:
        # Of a damaged page Arrow says the same kind of thing as of storage that is away.
        verify_shard(store_uri, shard)
        raise explained(uri, "read", error) from error
    if num_rows != shard.rows:
        raise SchemaError(
            f"shard {uri} holds {num_rows} users, its manifest says {shard.rows}; prepare the "
            "store again"
        )
