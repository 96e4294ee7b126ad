"""Views in which items became others of a pool of their own, drawn by counter."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt64

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import below, chosen, mixed, share_of

_UNIT = float(1 << 53)
_WHETHER, _WHICH = 21, 22
"""Purposes of draws, apart from those of other views."""


def substituted(
    sequences: Ragged,
    keys: UInt64[np.ndarray, " rows"],
    pools: Ragged,
    *,
    share: float,
    draw: Literal["each", "share"],
    most: int,
) -> Ragged:
    """Each row with some items become others, uniformly drawn from the pool of each.

    Source: SRA-CL's semantic substitution (arXiv:2503.04162). `each` is the authors' code, which
        decides item by item; `share` the paper's text, floor(share L) items, but one at least.

    Args:
        sequences: Rows of items.
        keys: One a row.
        pools: Row i is of item i, the nearest first; row 0 is of none. Items without any stay.
        share: Of the items that are replaced.
        draw: See above.
        most: An item becomes one of the first so many of its pool.
    """
    if draw == "each":
        at = np.flatnonzero(_heads(sequences, keys, share))
    else:
        counts = np.maximum(share_of(sequences.lengths, share), np.minimum(sequences.lengths, 1))
        at = chosen(sequences, counts if share > 0 else 0 * counts, mixed(keys, _WHETHER))
    choices = np.minimum(pools.lengths[sequences.values[at]], most)
    at, choices = at[choices > 0], choices[choices > 0]
    draws = mixed(mixed(keys, _WHICH)[sequences.rows[at]], sequences.positions[at])
    values = sequences.values.copy()
    values[at] = pools.values[pools.offsets[values[at]] + below(draws, choices)]
    return Ragged(values, sequences.offsets)


def _heads(
    sequences: Ragged, keys: UInt64[np.ndarray, " rows"], share: float
) -> Bool[np.ndarray, " values"]:
    """True for each item with a probability of `share`, apart from the others."""
    draws = mixed(mixed(keys, _WHETHER)[sequences.rows], sequences.positions)
    return (draws >> np.uint64(11)).astype(np.float64) / _UNIT < share
