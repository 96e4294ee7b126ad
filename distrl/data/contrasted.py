"""Which prefixes of a sample are contrasted: the same wherever it is asked, for the key decides."""

import numpy as np
from jaxtyping import Int64, UInt64

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import chosen, mixed

_CHOICE = 12
"""Purpose of draws, apart from those of the views."""


def contrasted_ends(
    inputs: Ragged, keys: UInt64[np.ndarray, " n"], count: int
) -> Int64[np.ndarray, " pairs"]:
    """Where each contrasted prefix ends: the whole of each sample, then random shorter ones.

    Args:
        inputs: Rows of at least one item.
        keys: One a row.
        count: Prefixes of each row, fewer where it has fewer.

    Returns:
        Indices into the values of `inputs`.
    """
    ends = inputs.offsets[1:] - 1
    if count == 1:
        return ends
    is_shorter = np.ones(len(inputs.values), dtype=bool)
    is_shorter[ends] = False
    shorter = Ragged(np.arange(len(inputs.values)), inputs.offsets).keep(is_shorter)
    counts = np.minimum(shorter.lengths, count - 1)
    found = shorter.values[chosen(shorter, counts, mixed(keys, _CHOICE))]
    return np.concatenate([ends, found])
