"""Leave-one-out cases out of ragged sequences, vectorised."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from distrl.ops.ragged import Ragged
from distrl.schema import NUM_HELD_OUT, PAD_ID, Split

HELD_BACK: dict[Split, int] = {"validation": NUM_HELD_OUT, "test": NUM_HELD_OUT - 1}
"""Items at a sequence's end that are no history: the target, and what comes after it."""


@dataclass(frozen=True, slots=True)
class Cases:
    """One target a user, and what came before it."""

    histories: Ragged
    targets: Int64[np.ndarray, " cases"]
    lengths: Int64[np.ndarray, " cases"]
    """Items of the user's whole sequence, held-out ones included."""
    rows: Int64[np.ndarray, " cases"]
    """Row of the sequences each case comes from."""


def held_out_cases(sequences: Ragged, split: Split) -> Cases:
    """The cases of one split; a sequence too short for a target and a history has none.

    For `validation` the target is the last item but one, for `test` the last, and the history is
    all before it: the test history ends with the validation target.
    """
    history_lengths = sequences.lengths - HELD_BACK[split]
    rows = np.flatnonzero(history_lengths > 0)
    chosen = sequences.take(rows)
    ends = chosen.offsets[1:] - HELD_BACK[split]
    is_history = np.arange(len(chosen.values)) < np.repeat(ends, chosen.lengths)
    return Cases(chosen.keep(is_history), chosen.values[ends], chosen.lengths, rows)


def training_items(sequences: Ragged) -> Int64[np.ndarray, " tokens"]:
    """The items training may see: all but the held-out end of each sequence."""
    ends = np.repeat(sequences.offsets[1:] - NUM_HELD_OUT, sequences.lengths)
    return sequences.values[np.arange(len(sequences.values)) < ends]


def last_occurrence(histories: Ragged) -> Bool[np.ndarray, " tokens"]:
    """Which values do not come again in their row: each distinct item once, where it is newest."""
    order = np.lexsort((histories.values, histories.rows))  # stable: positions rise within an item
    rows, values = histories.rows[order], histories.values[order]
    ends_run = np.ones(len(values), dtype=bool)
    ends_run[:-1] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    is_last = np.empty(len(values), dtype=bool)
    is_last[order] = ends_run
    return is_last


def renamed(cases: Cases, item_map: Int64[np.ndarray, " items"]) -> Cases:
    """The cases in another catalog's item ids; unknown items leave the histories.

    Args:
        cases: In this catalog's ids.
        item_map: The other id of each id here, PAD_ID where there is none. An unknown target
            becomes PAD_ID, and a history may become empty.
    """
    values = item_map[cases.histories.values]
    histories = Ragged(values, cases.histories.offsets).keep(values != PAD_ID)
    return Cases(histories, item_map[cases.targets], cases.lengths, cases.rows)
