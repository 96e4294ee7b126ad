"""Histories as the encoder reads them when it ranks: one a row, cut to their newest items."""

import numpy as np
import torch

from distrl.contract import Packed
from distrl.ops.ragged import Ragged
from distrl.schema import PAD_ID


def pad_histories(histories: Ragged, max_len: int) -> Packed:
    """One history a row, left-aligned, padded on the right to the longest one.

    Args:
        histories: Item ids, oldest first; every row holds at least one.
        max_len: Older items than the last `max_len` are left out.

    Raises:
        ValueError: If a history is empty: it has no newest item to take the state of.
    """
    if not histories.lengths.all():
        raise ValueError(f"history {int(histories.lengths.argmin())} is empty")
    newest = histories.newest(max_len)
    lengths = newest.lengths
    num_rows, width = len(lengths), int(lengths.max(initial=0))
    position = np.broadcast_to(np.arange(width), (num_rows, width))
    is_item = position < lengths[:, None]
    items = np.full((num_rows, width), PAD_ID, dtype=np.int64)
    items[is_item] = newest.values
    return Packed(
        items=torch.from_numpy(items),
        segment=torch.from_numpy(np.where(is_item, np.arange(num_rows)[:, None], -1)),
        position=torch.from_numpy(np.where(is_item, position, 0)),
        last=torch.from_numpy(np.arange(num_rows) * width + lengths - 1),
    )
