"""Stores whose items tell whose they are, with tables of neighbors drawn at random beside them."""

import numpy as np
import pyarrow as pa

from distrl.data.side_tables import SideManifest, part_path, write_manifest, write_part
from distrl.data.store import manifest_hash
from distrl.ops.ragged import Ragged
from distrl.ops.windows import window_items, windows_of
from tests.store_factory import make_store

LONGEST = 50
"""Item u * LONGEST + i + 1 is the i-th of user u, in no other's sequence."""


def whose(item):
    """The user of an item, and the length of the prefix that ends with it."""
    return (item - 1) // LONGEST, (item - 1) % LONGEST + 1


def own_items(lengths):
    return [[user * LONGEST + i + 1 for i in range(n)] for user, n in enumerate(lengths)]


def neighbor_store(
    folder,
    lengths,
    *,
    k=3,
    max_len=8,
    dimension=4,
    windows="every",
    num_shards=2,
    row_group_rows=3,
    seed=0,
):
    """A store and its table `near`; what the table says of each window by (user, length).

    Returns:
        The manifest, that of the table, and {(user, length): [(user, length), ...]}.
    """
    sequences = own_items(lengths)
    manifest = make_store(
        folder,
        sequences,
        num_shards=num_shards,
        row_group_rows=row_group_rows,
        num_items=len(lengths) * LONGEST,
    )
    rng = np.random.default_rng(seed)
    everything = [
        (user, length)
        for user, n in enumerate(lengths)
        for length in windows_of(np.array([n]), windows).length.tolist()
    ]
    chosen, number = {}, {window: n for n, window in enumerate(everything)}
    for own in everything:
        count = int(rng.integers(0, k + 1))
        drawn = [everything[i] for i in rng.integers(0, len(everything), 20 * k)]
        others = list(dict.fromkeys(window for window in drawn if window[0] != own[0]))
        chosen[own] = others[:count]
    parts, pools, shape = [], [], (max_len, windows, dimension)
    for shard in range(num_shards):
        users = list(range(shard, len(lengths), num_shards))
        groups = []
        for start in range(0, len(users), row_group_rows):
            here = users[start : start + row_group_rows]
            groups.append(_group(here, start, sequences, chosen, number, shape))
        for folder_name, which, kept in (("windows", 0, parts), ("pool", 1, pools)):
            path = part_path("neighbors", "near", folder_name, shard)
            tables = [group[which] for group in groups]
            kept.append(write_part(str(folder), path, tables, tables[0].schema))
    items = _items(str(folder), manifest.num_items, k)
    table = SideManifest(
        kind="neighbors",
        store_hash=manifest_hash(manifest),
        made_with={},
        windows=windows,
        max_len=max_len,
        dimension=dimension,
        num_neighbors=k,
        items=(items,),
        window_parts=tuple(parts),
        pools=tuple(pools),
    )
    write_manifest(str(folder), "near", table)
    return manifest, table, chosen


def vector_of(window, dimension):
    """Text vectors that say which window they are of, exact in half precision."""
    return [float(window[0]), float(window[1]), *([0.5] * (dimension - 2))]


def near_items(item, num_items, k):
    """The pool of an item: those that follow it, around the end."""
    return [(item + step) % num_items + 1 for step in range(k)]


def _items(uri, num_items, k):
    ids = list(range(1, num_items + 1))
    table = pa.table(
        {
            "item_id": pa.array(ids, pa.int32()),
            "neighbors": pa.array([near_items(i, num_items, k) for i in ids], pa.list_(pa.int32())),
        }
    )
    return write_part(uri, part_path("neighbors", "near", "items", 0), [table], table.schema)


def _group(here, start, sequences, chosen, number, shape):
    max_len, which, dimension = shape
    own = windows_of(np.array([len(sequences[u]) for u in here]), which)
    asked = [(here[row], length) for row, length in zip(own.row, own.length.tolist(), strict=True)]
    pool = sorted({window for one in asked for window in chosen[one]})
    place = {window: number for number, window in enumerate(pool)}
    vector = pa.list_(pa.float16(), dimension)

    def vectors(windows):
        flat = np.array([vector_of(w, dimension) for w in windows], dtype=np.float16)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), dimension)

    windows = pa.table(
        {
            "row": pa.array((own.row + start).astype(np.int32)),
            "length": pa.array(own.length.astype(np.int32)),
            "vector": vectors(asked).cast(vector),
            "neighbors": pa.array(
                [[place[w] for w in chosen[one]] for one in asked], pa.list_(pa.int32())
            ),
        }
    )
    shown = [
        window_items(
            Ragged.of([sequences[user]]), windows_of(np.array([length + 3]), "last"), max_len
        ).values.tolist()
        for user, length in pool
    ]
    found = pa.table(
        {
            "window": pa.array([number[w] for w in pool], pa.int64()),
            "user": pa.array([user for user, _ in pool], pa.int64()),
            "length": pa.array([length for _, length in pool], pa.int32()),
            "items": pa.array(shown, pa.list_(pa.int32())),
            "vector": vectors(pool).cast(vector),
        }
    )
    return windows, found
