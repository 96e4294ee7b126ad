"""Learned views of LACLRec: a sequence after the operations that its augmenter chose."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distrl.contract import Damaged, Mark, Packed
from distrl.ops.corruption import DELETE, INSERT, KEEP, applied
from distrl.ops.packing import pack, unpacked
from distrl.ops.ragged import Ragged
from distrl.schema import PAD_ID

NAMES = {"keep": KEEP, "delete": DELETE, "insert": INSERT}


class Mended(NamedTuple):
    """Sequences after the operations chosen for them."""

    sequences: Packed
    operations: Int64[Tensor, " N"]
    """Of each slot, padding too."""
    inserted_at: Int64[Tensor, " A"]
    """Flat index of the slots in front of which items came."""
    inserted: Int64[Tensor, "A K"]
    """Those items, the nearest first, then PAD_ID."""
    is_item: Tensor
    """Which slots hold an item."""

    def shares(self) -> dict[str, float]:
        """How often each operation was chosen, over the slots that hold an item."""
        chosen = self.operations[self.is_item]
        return {
            f"{name}_share": float((chosen == number).float().mean()) if len(chosen) else 0.0
            for name, number in NAMES.items()
        }


def mended(
    packed: Packed,
    operations: Int64[Tensor, " N"],
    generate: Callable[[Int64[Tensor, " A"]], Int64[Tensor, "A K"]],
    *,
    max_len: int,
    empty_id: int,
    scramble: bool,
) -> Mended:
    """Sequences after one operation a slot.

    Args:
        packed: The sequences.
        operations: Of each slot; those of padding are not read.
        generate: The items that belong in front of some slots.
        max_len: Older items than the newest `max_len` are left out.
        empty_id: What a sequence becomes of which nothing is left.
        scramble: Whether repeated items and the order are lost: items rise by id then.
    """
    is_item = packed.segment.flatten() >= 0
    anchor_at = torch.nonzero(is_item & (operations == INSERT))[:, 0]
    inserted = generate(anchor_at)
    sequences, slots = unpacked(packed)
    gaps = _rows_a_token(inserted.cpu().numpy(), anchor_at.cpu().numpy(), slots)
    whole = applied(sequences, operations.cpu().numpy()[slots], gaps)
    whole = whole.keep((whole.values != PAD_ID) & (whole.values != empty_id))
    if scramble:
        whole = _as_sets(whole)
    view = _filled(whole.newest(max_len), empty_id)
    device = packed.items.device
    return Mended(
        pack(view, packed.items.shape[1])[0].to(device), operations, anchor_at, inserted, is_item
    )


def _rows_a_token(
    inserted: Int64[np.ndarray, "A K"],
    anchor_at: Int64[np.ndarray, " A"],
    slots: Int64[np.ndarray, " tokens"],
) -> Ragged:
    """What comes in front of each token, which is nothing for all but the anchors."""
    counts = np.zeros(int(slots.max(initial=-1)) + 1, dtype=np.int64)
    counts[anchor_at] = (inserted != PAD_ID).sum(axis=1)
    # Anchors rise by slot, tokens need not: a stable order brings one to the other.
    anchor_of = np.full(len(counts), -1)
    anchor_of[anchor_at] = np.arange(len(anchor_at))
    order = anchor_of[slots]
    order = order[order >= 0]
    rows = inserted[order]
    return Ragged(rows[rows != PAD_ID], np.concatenate([[0], np.cumsum(counts[slots])]))


def _as_sets(sequences: Ragged) -> Ragged:
    """Each row once through Python's set, in whose order it comes out, as in the code."""
    rows = np.split(sequences.values, sequences.offsets[1:-1])
    return Ragged.of([list(set(row.tolist())) for row in rows])


def _filled(sequences: Ragged, empty_id: int) -> Ragged:
    """Rows without any item hold one."""
    lengths = np.maximum(sequences.lengths, 1)
    values = np.full(int(lengths.sum()), empty_id, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values[sequences.positions + offsets[:-1][sequences.rows]] = sequences.values
    return Ragged(values, offsets)


def marked(packed: Packed, found: Mended, count: int) -> list[list[tuple[int, Mark]]]:
    """The first sequences with what was done to each of their items, inserted ones among them."""
    put = {
        at: [item for item in items if item != PAD_ID]
        for at, items in zip(found.inserted_at.tolist(), found.inserted.tolist(), strict=True)
    }
    sequences, slots = unpacked(packed)
    deleted = (found.operations.cpu().numpy()[slots] == DELETE).tolist()
    rows: list[list[tuple[int, Mark]]] = []
    for start, stop in zip(sequences.offsets[:-1][:count], sequences.offsets[1:], strict=False):
        row: list[tuple[int, Mark]] = []
        for token in range(start, stop):
            for item in reversed(put.get(int(slots[token]), [])):
                row.append((item, "inserted"))
            row.append((int(sequences.values[token]), "deleted" if deleted[token] else "kept"))
        rows.append(row)
    return rows


def unchanged_share(views: Packed, prefixes: Packed) -> float:
    """Share of views that are the prefix itself, item by item; 0 where there are none."""
    ours, theirs = unpacked(views)[0], unpacked(prefixes)[0]
    alike = np.flatnonzero(ours.lengths == theirs.lengths)
    ours, whole = ours.take(alike), theirs.take(alike)
    differs = np.bincount(ours.rows[ours.values != whole.values], minlength=len(alike)) > 0
    return int((~differs).sum()) / max(len(theirs.lengths), 1)


def mending_figures(damaged: Damaged, found: Mended) -> dict[str, float]:
    """How well damage was found and undone, over the slots of damaged sequences.

    `delete_recall`: share of planted items that are deleted. `false_deletions`: share of items that
    belong there that are deleted. `delete_precision`: share of deleted items that were planted.
    `insert_recall`: share of gaps that are seen. `insert_precision`: share of slots with insertions
    that have a gap. `reinserted`: share of missing items that come back into their own gap, and
    `reinserted_precision`: share of inserted items that were missing there.
    """
    truth = damaged.operations.flatten()
    chosen = torch.where(truth >= 0, found.operations, -1)
    back = _reinserted(damaged, found)
    missing, inserted = int((damaged.missing > 0).sum()), int((found.inserted > 0).sum())
    return {
        "delete_recall": _share((chosen == DELETE) & (truth == DELETE), truth == DELETE),
        "delete_precision": _share((chosen == DELETE) & (truth == DELETE), chosen == DELETE),
        "false_deletions": _share(
            (chosen == DELETE) & (truth != DELETE), (truth >= 0) & (truth != DELETE)
        ),
        "insert_recall": _share((chosen == INSERT) & (truth == INSERT), truth == INSERT),
        "insert_precision": _share((chosen == INSERT) & (truth == INSERT), chosen == INSERT),
        "reinserted": back / max(missing, 1),
        "reinserted_precision": back / max(inserted, 1),
    }


def _share(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(int(whole.sum()), 1)


def _reinserted(damaged: Damaged, found: Mended) -> int:
    """Missing items that were inserted into the gap that they are missing from."""
    where = torch.full((len(found.operations),), -1, device=found.operations.device)
    where[found.inserted_at] = torch.arange(len(found.inserted_at), device=where.device)
    row = where[damaged.anchor_at]
    missing, inserted = damaged.missing[row >= 0], found.inserted[row[row >= 0]]
    same = (missing[:, :, None] == inserted[:, None, :]) & (missing > 0)[:, :, None]
    # An item that is missing twice comes back twice only where it is inserted twice.
    same &= _times_before(missing)[:, :, None] == _times_before(inserted)[:, None, :]
    return int(same.any(dim=2).sum())


def _times_before(items: Int64[Tensor, "A K"]) -> Int64[Tensor, "A K"]:
    """How often each item stands in its row already."""
    same = items[:, :, None] == items[:, None, :]
    return same.tril(diagonal=-1).sum(dim=2)
