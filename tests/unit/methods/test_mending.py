"""Figures of mended sequences, counted by hand."""

import pytest
import torch

from distrl.contract import Damaged
from distrl.methods.mending import mended, mending_figures, unchanged_share
from distrl.ops.corruption import DELETE, INSERT, KEEP
from distrl.ops.packing import pack
from distrl.ops.ragged import Ragged
from tests.packed import pack_rows

MAX_LEN = 6


def figures_of(rows, truth, gaps, chosen, inserted):
    """Figures where `gaps` are missing, by flat slot, and `inserted` come in, by slot in order."""
    packed = pack_rows(rows, MAX_LEN)
    is_item = packed.segment.flatten() >= 0
    # Whatever is chosen in padding counts for nothing.
    operations = torch.full((packed.items.numel(),), DELETE)
    operations[is_item] = torch.tensor(chosen)
    of_slot = torch.full_like(operations, -1)
    of_slot[is_item] = torch.tensor(truth)
    found = mended(
        packed,
        operations,
        lambda at: torch.tensor(inserted, dtype=torch.int64).reshape(-1, 2),
        max_len=MAX_LEN,
        empty_id=40,
        scramble=False,
    )
    missing = torch.tensor(list(gaps.values()), dtype=torch.int64).reshape(-1, 2)
    anchor_at = torch.tensor(list(gaps), dtype=torch.int64)
    return mending_figures(
        Damaged(packed, of_slot.view(packed.items.shape), anchor_at, missing), found
    )


def test_figures_are_the_fractions_counted_by_hand():
    # Of 1 2 3 4 5 and 6 7 8 9: 20, 21 and 22 were planted, and 2 3 and 7 deleted.
    rows = [[1, 20, 4, 21, 5], [6, 22, 8, 9]]
    truth = [KEEP, DELETE, INSERT, DELETE, KEEP, KEEP, DELETE, INSERT, KEEP]
    gaps = {2: [3, 2], MAX_LEN + 2: [7, 0]}
    # 1 is deleted wrongly and 20 rightly; 21 and 22 are missed. Items come in where they are
    # missing, in front of 4, and where none are, in front of 5 and 6; the gap before 8 is missed.
    chosen = [DELETE, DELETE, INSERT, KEEP, INSERT, INSERT, KEEP, KEEP, KEEP]
    inserted = [[2, 11], [12, 0], [7, 0]]
    assert figures_of(rows, truth, gaps, chosen, inserted) == pytest.approx(
        {
            "delete_recall": 1 / 3,  # 20, of 20, 21 and 22
            "delete_precision": 1 / 2,  # 20, of 1 and 20
            "false_deletions": 1 / 6,  # 1, of 1, 4, 5, 6, 8 and 9
            "insert_recall": 1 / 2,  # the gap before 4, of those before 4 and 8
            "insert_precision": 1 / 3,  # before 4, of before 4, 5 and 6
            "reinserted": 1 / 3,  # 2, of 2, 3 and 7; 7 came back in another place
            "reinserted_precision": 1 / 4,  # 2, of 2, 11, 12 and 7
        }
    )


def test_an_item_that_is_missing_twice_comes_back_as_often_as_it_is_inserted():
    chosen = [KEEP, INSERT]
    for inserted, back, precision in (([[3, 0]], 1 / 2, 1.0), ([[3, 3]], 1.0, 1.0)):
        figures = figures_of([[1, 2]], [KEEP, INSERT], {1: [3, 3]}, chosen, inserted)
        assert figures["reinserted"] == back
        assert figures["reinserted_precision"] == precision
    figures = figures_of([[1, 2]], [KEEP, INSERT], {1: [3, 0]}, chosen, [[3, 3]])
    assert (figures["reinserted"], figures["reinserted_precision"]) == (1.0, 1 / 2)


def test_all_figures_are_zero_where_nothing_is_wrong_and_nothing_is_done():
    figures = figures_of([[1, 2], [3]], [KEEP] * 3, {}, [KEEP] * 3, [])
    assert len(figures) == 7
    assert set(figures.values()) == {0.0}


def test_a_view_is_unchanged_where_it_has_the_prefixs_items_in_their_order():
    prefixes = [[1, 2, 3], [4], [5, 6], [7, 8, 9], [2], [3, 3]]
    # Whole, longer, another item, another order, whole, and shorter.
    views = [[1, 2, 3], [4, 4], [5, 0], [7, 9, 8], [2], [3]]
    packs = [pack(Ragged.of(rows), MAX_LEN)[0] for rows in (views, prefixes)]
    assert unchanged_share(*packs) == 2 / 6
    none, _ = pack(Ragged.of([]), MAX_LEN)
    assert unchanged_share(none, none) == 0.0
