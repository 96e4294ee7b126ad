"""Ragged sequences laid end to end into rows of a fixed length."""

import numpy as np
import torch
from jaxtyping import Int64

from distrl.contract import Packed
from distrl.ops.ragged import Ragged
from distrl.schema import PAD_ID


def pack(sequences: Ragged, row_length: int) -> tuple[Packed, Int64[np.ndarray, " tokens"]]:
    """Packs sequences into as few rows as best-fit decreasing finds.

    Args:
        sequences: Rows of 1 to `row_length` items.
        row_length: Slots of a packed row.

    Returns:
        The packed sequences, segments numbered as the rows of `sequences`, and the flat index of
        each of its values.

    Raises:
        ValueError: If a sequence is empty or longer than a row.
    """
    lengths = sequences.lengths
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(
            f"sequences of {lengths.min()} to {lengths.max()} items do not fit rows of {row_length}"
        )
    row, start, num_rows = _best_fit(lengths, row_length)
    rows = sequences.rows
    position = np.arange(len(rows)) - sequences.offsets[:-1][rows]
    slots = (row * row_length + start)[rows] + position
    num_rows = max(num_rows, 1)
    items = np.full(num_rows * row_length, PAD_ID, dtype=np.int64)
    segment = np.full(num_rows * row_length, -1, dtype=np.int64)
    places = np.zeros(num_rows * row_length, dtype=np.int64)
    items[slots], segment[slots], places[slots] = sequences.values, rows, position
    last = row * row_length + start + lengths - 1
    shape = (num_rows, row_length)
    packed = Packed(
        torch.from_numpy(items).view(shape),
        torch.from_numpy(segment).view(shape),
        torch.from_numpy(places).view(shape),
        torch.from_numpy(last.astype(np.int64)),
    )
    return packed, slots


def _best_fit(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and first slot of each sequence: longest first, each into the fullest row it fits."""
    row = np.zeros(len(lengths), dtype=np.int64)
    start = np.zeros(len(lengths), dtype=np.int64)
    rows_with_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    num_rows, widest = 0, 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        space = next((s for s in range(length, widest + 1) if rows_with_space[s]), None)
        if space is None:
            space, place, num_rows = row_length, num_rows, num_rows + 1
        else:
            place = rows_with_space[space].pop()
        row[index], start[index] = place, row_length - space
        rows_with_space[space - length].append(place)
        widest = max(widest, space - length)
    return row, start, num_rows
