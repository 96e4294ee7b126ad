"""Finished tables of vectors from arrays, for tests of what reads them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrl.data.side_tables import SideManifest, part_path, write_manifest, write_part
from distrl.data.store import manifest_hash, read_manifest
from distrl.ops.windows import windows_of


def windows_of_store(store, which, *, held_out=False):
    """For each shard the rows, lengths and whole sequences of its windows, in plain lists."""
    found = []
    for shard in read_manifest(store).sequences:
        sequences = pq.read_table(f"{store}/{shard.path}").column("items").to_pylist()
        lengths = np.array([len(sequence) for sequence in sequences])
        windows = windows_of(lengths, which, held_out=held_out)
        pairs = zip(windows.row.tolist(), windows.length.tolist(), strict=True)
        found.append([(row, length, sequences[row]) for row, length in pairs])
    return found


def make_embeddings(
    store, items, vector_of, *, which="every", held_out=False, max_len=4, name="e", num_parts=1
):
    """Writes a table of vectors.

    Args:
        store: Where the store is.
        items: Vectors of items 1..V.
        vector_of: Called with shard, row and length of a window, gives its vector.
        which: Which windows.
        held_out: With those that are held out.
        max_len: Items that a window shows.
        name: Of the table.
        num_parts: Of the items.
    """
    dimension = items.shape[1]
    vector = pa.list_(pa.float32(), dimension)

    def vectors(rows):
        flat = np.asarray(rows, np.float32).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), dimension)

    schema = pa.schema({"item_id": pa.int32(), "vector": vector})
    item_parts = []
    for part, ids in enumerate(np.array_split(np.arange(1, len(items) + 1), num_parts)):
        table = pa.table([pa.array(ids, pa.int32()), vectors(items[ids - 1])], schema=schema)
        path = part_path("embeddings", name, "items", part)
        item_parts.append(write_part(store, path, [table], schema))
    schema = pa.schema({"row": pa.int32(), "length": pa.int32(), "vector": vector})
    window_parts = []
    windows = [] if which == "none" else windows_of_store(store, which, held_out=held_out)
    for shard, found in enumerate(windows):
        columns = [
            pa.array([row for row, _, _ in found], pa.int32()),
            pa.array([length for _, length, _ in found], pa.int32()),
            vectors([vector_of(shard, row, length) for row, length, _ in found]),
        ]
        path = part_path("embeddings", name, "windows", shard)
        # Two row groups, as whoever writes the table is free to choose them.
        whole, half = pa.table(columns, schema=schema), len(found) // 2
        pieces = [whole.slice(0, half), whole.slice(half)]
        window_parts.append(write_part(store, path, pieces, schema))
    table = SideManifest(
        kind="embeddings",
        store_hash=manifest_hash(read_manifest(store)),
        made_with={},
        windows=which,
        held_out=held_out,
        max_len=max_len,
        dimension=dimension,
        items=tuple(item_parts),
        window_parts=tuple(window_parts),
    )
    write_manifest(store, name, table)
    return table
