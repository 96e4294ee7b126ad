"""Ragged sequences laid end to end into rows of a fixed length."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from distrl.contract import Packed
from distrl.ops.ragged import Ragged
from distrl.schema import PAD_ID


def pack(sequences: Ragged, row_length: int) -> tuple[Packed, Int64[np.ndarray, " tokens"]]:
    """Packs sequences into as few rows as first-fit decreasing finds.

    Args:
        sequences: Rows of 1 to `row_length` items.
        row_length: Slots of a packed row.

    Returns:
        The packed sequences, segments numbered as the rows of `sequences`, and the flat index of
        each of its values. No sequences make one row of padding.

    Raises:
        ValueError: If a sequence is empty or longer than a row.
    """
    lengths = sequences.lengths
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(
            f"sequences of {lengths.min()} to {lengths.max()} items do not fit rows of {row_length}"
        )
    first, num_rows = first_fit_decreasing(lengths, row_length)
    rows, positions = sequences.rows, sequences.positions
    slots = first[rows] + positions
    size = max(num_rows, 1) * row_length
    items = np.full(size, PAD_ID, dtype=np.int64)
    segment = np.full(size, -1, dtype=np.int64)
    position = np.zeros(size, dtype=np.int64)
    items[slots], segment[slots], position[slots] = sequences.values, rows, positions
    packed = Packed(
        torch.from_numpy(items).view(-1, row_length),
        torch.from_numpy(segment).view(-1, row_length),
        torch.from_numpy(position).view(-1, row_length),
        torch.from_numpy(first + lengths - 1),
    )
    return packed, slots


def unpacked(packed: Packed) -> tuple[Ragged, Int64[np.ndarray, " tokens"]]:
    """The sequences of packed rows, on the host, and the flat index of each of their values."""
    segment = packed.segment.flatten().cpu().numpy()
    slots = np.flatnonzero(segment >= 0)
    slots = slots[np.lexsort((packed.position.flatten().cpu().numpy()[slots], segment[slots]))]
    lengths = np.bincount(segment[slots], minlength=len(packed.last))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(packed.items.flatten().cpu().numpy()[slots], offsets), slots


def fill_share(packed: Packed) -> float:
    """Share of the slots that hold an item."""
    return float((packed.segment >= 0).float().mean())


class _Run(NamedTuple):
    """Some sequences of one length at one place of some consecutive rows filled alike."""

    length: int
    first_row: int
    num_rows: int
    offset: int
    """First slot within the row."""
    per_row: int
    """Sequences side by side in each row."""


def first_fit_decreasing(
    lengths: Int64[np.ndarray, " rows"], row_length: int
) -> tuple[Int64[np.ndarray, " rows"], int]:
    """Flat index of the first slot of each sequence, and the number of rows.

    The longest sequence left goes into the first row that it fits. That fills one row after the
    other, and rows filled alike are dealt with at once: the loop is over kinds of rows, of which
    there are few, however many sequences there are.
    """
    runs, num_rows = _runs(np.bincount(lengths, minlength=row_length + 1).tolist(), row_length)
    # A stable sort, so that the longest first of both sides are the same sequences.
    runs.sort(key=lambda run: -run.length)
    table = np.array(runs, dtype=np.int64).reshape(-1, len(_Run._fields))
    length, first_row, run_rows, offset, per_row = table.T
    counts = run_rows * per_row
    run = np.repeat(np.arange(len(runs)), counts)
    number = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = first_row[run] + number // per_row[run]
    slot = offset[run] + number % per_row[run] * length[run]
    first = np.empty(len(lengths), dtype=np.int64)
    first[np.argsort(-lengths, kind="stable")] = row * row_length + slot
    return first, num_rows


def _runs(left: list[int], row_length: int) -> tuple[list[_Run], int]:
    """Fills rows from a count of sequences by length; takes the counts down to zero."""
    runs: list[_Run] = []
    present = [length for length in range(row_length, 0, -1) if left[length]]
    num_rows = 0
    while present:
        offset, row = 0, []
        for length in present:
            per_row = min(left[length], (row_length - offset) // length)
            if per_row:
                row.append((length, offset, per_row))
                offset += per_row * length
        alike = min(left[length] // per_row for length, _, per_row in row)
        for length, offset, per_row in row:
            runs.append(_Run(length, num_rows, alike, offset, per_row))
            left[length] -= alike * per_row
        num_rows += alike
        present = [length for length in present if left[length]]
    return runs, num_rows
