"""Random items in the sequences of a store, for studies of robustness."""

import numpy as np
import pyarrow as pa

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, with_random_items
from distrl.schema import NUM_HELD_OUT


def with_noise(table: pa.Table, share: float, num_items: int, seed: int) -> pa.Table:
    """Sequences with random items among all but their held-out ones.

    For each of the L items in front of the held-out ones a share of an item is put in, items that
    are not among them, at places drawn uniformly; `with_random_items` has the rule. What is drawn
    for a user depends on the user and the seed alone. A random item has the time of the item that
    it stands in front of.

    Deviation: the noisy sets of STEAM and TCLARec, LACLRec's ancestor and successor, are damaged as
    their augmenter's training sequences are, with items deleted too: .8 kept, .1 deleted and .1
    inserted in those that STEAM ships, .4, .3 and .3 in TCLARec's script. Here none is deleted.

    Args:
        table: One row a user: items, hash (of the user) and perhaps timestamps, besides others.
        share: Random items for each item of the user's own.
        num_items: Items of the catalog, V.
        seed: Of the draws.
    """
    items = table.column("items").combine_chunks()
    own = Ragged(
        items.values.to_numpy().astype(np.int64), items.offsets.to_numpy().astype(np.int64)
    )
    heads_length = np.maximum(own.lengths - NUM_HELD_OUT, 0)
    heads = own.pieces(own.offsets[:-1], heads_length)
    keys = mixed(table.column("hash").to_numpy(), seed)
    longest = int(heads.lengths.max(initial=0))
    room = longest + int(np.ceil(share * longest)) + 1
    noisy = with_random_items(heads, room, share, num_items, keys)

    width = num_items + 1
    known = np.isin(noisy.rows * width + noisy.values, heads.rows * width + heads.values)
    offsets = noisy.offsets + np.concatenate([[0], np.cumsum(own.lengths - heads_length)])
    is_own = np.ones(offsets[-1], dtype=bool)
    places = noisy.positions + offsets[:-1][noisy.rows]
    is_own[places] = known
    # So many own items stand in front of a place, and the next one is the user's own or held out.
    following = np.cumsum(is_own) - is_own
    values = own.values[following]
    values[places] = noisy.values
    lists = {"items": pa.array(values, items.type.value_type)}
    if "timestamps" in table.column_names:
        times = table.column("timestamps").combine_chunks().values
        lists["timestamps"] = times.take(pa.array(following))
    for name, column in lists.items():
        made = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
        table = table.set_column(table.column_names.index(name), name, made)
    return table
