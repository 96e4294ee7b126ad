"""Columns of lists as ragged arrays."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from distrl.ops.ragged import Ragged


def to_ragged(column: pa.ChunkedArray) -> Ragged:
    """A column of lists."""
    items = column.combine_chunks()
    offsets = items.offsets.to_numpy().astype(np.int64)
    values = items.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return Ragged(values, offsets - offsets[0])


def lists_by_item(
    parts: Sequence[tuple[Int64[np.ndarray, " items"], Ragged]], num_items: int, most: int
) -> Ragged | None:
    """The first `most` of each item's list; row i is of item i, and row 0, which is empty, of none.

    Args:
        parts: Ids and lists of items, in any order.
        num_items: Of the catalog, V.
        most: Of a list.

    Returns:
        None if the parts do not hold the items 1..V once each, or list what is none of them.
    """
    heads = [
        lists.pieces(lists.offsets[:-1], np.minimum(lists.lengths, most)) for _, lists in parts
    ]
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *(of_part for of_part, _ in parts)])
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(head.lengths for head in heads)])
    values = np.concatenate([np.zeros(0, dtype=np.int64), *(head.values for head in heads)])
    if not np.array_equal(np.sort(ids), np.arange(1, num_items + 1)):
        return None
    if len(values) and not 1 <= values.min() <= values.max() <= num_items:
        return None
    rows = Ragged(values, np.concatenate([[0], np.cumsum(lengths)])).take(np.argsort(ids))
    return Ragged(rows.values, np.concatenate([[0], rows.offsets]))
