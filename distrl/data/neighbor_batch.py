"""The neighbors of a batch's prefixes, each packed once. Dimensions: U different neighbors."""

import numpy as np
import torch
from jaxtyping import Int64, UInt64

from distrl.contract import Neighbors, Packed
from distrl.data.found import Found
from distrl.ops.packing import pack
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import below


def drawn(found: Found, keys: UInt64[np.ndarray, " P"], *, most: int) -> Found:
    """One of the `most` nearest neighbors of each prefix that has any, each as likely."""
    starts = np.concatenate([[0], np.cumsum(found.counts)])[:-1]
    has_any = found.counts > 0
    chosen = (starts + below(keys, np.minimum(found.counts, most)))[has_any]
    return found.with_neighbors(chosen, has_any.astype(np.int64))


def neighbors_of(found: Found, anchors: Ragged, *, most: int, row_length: int) -> Neighbors:
    """The neighbors of some prefixes as a batch holds them, each of them once.

    A neighbor whose items are the beginning of another's, of the same user, is read off that one's
    states, which are causal: the encoder sees both in one segment.

    Args:
        found: What the table says of the prefixes.
        anchors: The prefixes, in the same order.
        most: Neighbors that are taken, K.
        row_length: Slots of a packed row.
    """
    starts = np.concatenate([[0], np.cumsum(found.counts)])
    rank = np.arange(len(found.window)) - np.repeat(starts[:-1], found.counts)
    taken = np.flatnonzero(rank < most)
    _, first, which = np.unique(found.window[taken], return_index=True, return_inverse=True)
    unique = taken[first]
    of_pair = np.full((len(found.counts), most), -1, dtype=np.int64)
    pair = np.repeat(np.arange(len(found.counts)), found.counts)
    of_pair[pair[taken], rank[taken]] = which
    holder = _holders(found.user[unique], found.length[unique], found.items.lengths[unique])
    held = np.unique(holder)
    packed, slots = pack(found.items.take(unique[held]), row_length)
    first_value = np.concatenate([[0], np.cumsum(found.items.lengths[unique[held]])])[:-1]
    own_first = first_value[np.searchsorted(held, holder)]
    last = slots[own_first + found.items.lengths[unique] - 1]
    sequences = Packed(packed.items, packed.segment, packed.position, torch.from_numpy(last))
    return Neighbors(
        pack(anchors, row_length)[0],
        sequences,
        torch.from_numpy(of_pair),
        torch.from_numpy(found.own.astype(np.float32)),
        torch.from_numpy(found.vectors[unique].astype(np.float32)),
    )


def _holders(
    user: Int64[np.ndarray, " U"], length: Int64[np.ndarray, " U"], shown: Int64[np.ndarray, " U"]
) -> Int64[np.ndarray, " U"]:
    """For each window the one in whose sequence it is: its user's longest that shows all of it."""
    holder = np.arange(len(user))
    whole = np.flatnonzero(length == shown)
    order = whole[np.lexsort((length[whole], user[whole]))]
    if len(order):
        is_last = np.append(user[order][1:] != user[order][:-1], True)
        ends = np.flatnonzero(is_last)
        holder[order] = order[ends[np.searchsorted(ends, np.arange(len(order)))]]
    return holder
