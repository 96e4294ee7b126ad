"""Columns of lists as ragged arrays."""

import numpy as np
import pyarrow as pa

from distrl.ops.ragged import Ragged


def to_ragged(column: pa.ChunkedArray) -> Ragged:
    """A column of lists."""
    items = column.combine_chunks()
    offsets = items.offsets.to_numpy().astype(np.int64)
    values = items.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return Ragged(values, offsets - offsets[0])
