"""Packed batches from Python lists, one sequence a row, for tests of what encodes them."""

import torch

from distrl.contract import Batch, Packed


def pack_rows(sequences, max_len):
    """One sequence a row, from the left."""
    rows = len(sequences)
    items = torch.zeros(rows, max_len, dtype=torch.int64)
    segment = torch.full((rows, max_len), -1)
    position = torch.zeros(rows, max_len, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        items[row, : len(sequence)] = torch.tensor(sequence)
        segment[row, : len(sequence)] = row
        position[row, : len(sequence)] = torch.arange(len(sequence))
    last = torch.tensor([row * max_len + len(s) - 1 for row, s in enumerate(sequences)])
    return Packed(items, segment, position, last)


def batch_of(sequences, targets, views, max_len):
    """A batch that predicts one target after each sequence."""
    clean = pack_rows(sequences, max_len)
    pair = None if views is None else (pack_rows(views[0], max_len), pack_rows(views[1], max_len))
    return Batch(clean, clean.last, torch.tensor(targets), pair)
