"""A partition: all interactions of some users, as ragged arrays, small enough for one task.

U users, N interactions, D distinct items. Users are ordered by a keyed hash of their id, so that
partitions and shards are ranges of one order which no number of tasks changes.
"""
# Arrow makes its compute functions when it is imported, where pyright cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrl.data.id_hash import hash_ids, slot

_ITEM_SEED = 0


@dataclass(frozen=True)
class Partition:
    """Users in the order of (hash, id); each one's interactions oldest first."""

    users: pa.Array
    """[U] the caller's ids."""
    hashes: np.ndarray
    """[U] uint64, not falling."""
    lengths: np.ndarray
    """[U] int64, interactions of each user; at least 1."""
    items: pa.Array
    """[D] the caller's ids, each once."""
    codes: np.ndarray
    """[N] int32, places in `items`."""
    times: np.ndarray | None
    """[N] int64 milliseconds, or None."""

    @property
    def num_interactions(self) -> int:
        """N."""
        return len(self.codes)


def split_by_user(events: pa.Table, num_partitions: int, seed: int) -> list[pa.Table]:
    """Events by the partition of their user, each in its old order."""
    users = events.column("user").combine_chunks().dictionary_encode()
    slots = slot(hash_ids(users.dictionary, seed), num_partitions)
    return split(events, slots[users.indices.to_numpy()], num_partitions)


def split(table: pa.Table, slots: np.ndarray, num_slots: int) -> list[pa.Table]:
    """Rows by their slot in 0..num_slots - 1, each in its old order."""
    if num_slots == 1:
        return [table]
    # numpy sorts 16 bits by radix, in one pass.
    narrow = slots.astype(np.uint16) if num_slots < 1 << 16 else slots
    order = np.argsort(narrow, kind="stable")
    ends = np.cumsum(np.bincount(slots, minlength=num_slots))
    return [
        table.take(pa.array(order[start:end]))
        for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)
    ]


def assemble(
    pieces: Sequence[pa.Table], keep: Literal["none", "first", "last"], seed: int
) -> Partition:
    """A partition from its events, which come in the order of the input.

    Events of the same user and time keep that order.

    Args:
        pieces: Tables with the columns user, item and perhaps timestamp.
        keep: Which interaction stays where a user meets an item repeatedly.
        seed: Of the hash that orders the users.
    """
    events = pa.concat_tables(pieces)
    has_times = "timestamp" in events.column_names
    times = events.column("timestamp").to_numpy() if has_times else None
    users = events.column("user").combine_chunks().dictionary_encode()
    items = events.column("item").combine_chunks().dictionary_encode()
    hashes = hash_ids(users.dictionary, seed)
    by_hash = _order_of_users(users.dictionary, hashes)
    rank = np.empty(len(by_hash), np.int64)
    rank[by_hash] = np.arange(len(by_hash))
    owners = rank[users.indices.to_numpy()]
    order = _by_owner_and_time(owners, times)
    owners, codes = owners[order], items.indices.to_numpy()[order]
    times = None if times is None else times[order]
    if keep != "none":
        stays = _first_of_pairs(owners, codes, reverse=keep == "last")
        owners, codes = owners[stays], codes[stays]
        times = None if times is None else times[stays]
    return Partition(
        users=users.dictionary.take(pa.array(by_hash)),
        hashes=hashes[by_hash],
        lengths=np.bincount(owners, minlength=len(by_hash)),
        items=items.dictionary,
        codes=codes,
        times=times,
    )


def newest(partition: Partition, most: int) -> Partition:
    """The partition with the newest interactions of each user, `most` at most."""
    lengths = partition.lengths
    ends = np.repeat(np.cumsum(lengths), lengths)
    stays = np.arange(partition.num_interactions) >= ends - most
    return replace(
        partition,
        lengths=np.minimum(lengths, most),
        codes=partition.codes[stays],
        times=None if partition.times is None else partition.times[stays],
    )


def _order_of_users(users: pa.Array, hashes: np.ndarray) -> np.ndarray:
    """Places of distinct users by rising hash, where equal by rising id."""
    order = np.argsort(hashes, kind="stable")
    if len(order) < 2 or (hashes[order][1:] != hashes[order][:-1]).all():
        return order
    by_id = pc.sort_indices(users).to_numpy()
    return by_id[np.argsort(hashes[by_id], kind="stable")]


def _by_owner_and_time(owners: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    if times is None or len(times) == 0:
        return np.argsort(owners, kind="stable")
    since_first = times - times.min()
    span = int(since_first.max()) + 1
    if span * (int(owners.max()) + 1) >= 1 << 63:
        return np.lexsort([times, owners])
    # One key sorts twice as fast as two.
    return np.argsort(owners * span + since_first, kind="stable")


def _first_of_pairs(owners: np.ndarray, codes: np.ndarray, *, reverse: bool) -> np.ndarray:
    """Places of the first (or last) interaction of each user and item, rising."""
    pairs = owners.astype(np.int64) << 32 | codes
    if not reverse:
        return np.sort(np.unique(pairs, return_index=True)[1])
    return np.sort(len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1])


def item_counts(partition: Partition, num_buckets: int) -> list[pa.Table]:
    """How often each item occurs, as tables of item and count by the item's bucket."""
    counts = np.bincount(partition.codes, minlength=len(partition.items))
    table = pa.table({"item": partition.items, "count": pa.array(counts, pa.int64())})
    table = table.filter(pc.greater(table.column("count"), 0))
    return split(table, item_buckets(table.column("item"), num_buckets), num_buckets)


def item_buckets(items: pa.Array | pa.ChunkedArray, num_buckets: int) -> np.ndarray:
    """The bucket of each item: a range of its hash."""
    whole = items.combine_chunks() if isinstance(items, pa.ChunkedArray) else items
    return slot(hash_ids(whole, _ITEM_SEED), num_buckets)


def shrink(
    partition: Partition, removed: Iterable[pa.Array], num_buckets: int, min_user_interactions: int
) -> Partition:
    """The partition without some items, then without the users left with too few interactions.

    Args:
        partition: What to shrink.
        removed: For each bucket of items, those to drop; one is held at a time.
        num_buckets: How many buckets there are.
        min_user_interactions: At least this many a user.
    """
    buckets = item_buckets(partition.items, num_buckets)
    alive = np.ones(len(partition.items), bool)
    for bucket, gone in enumerate(removed):
        places = np.flatnonzero(buckets == bucket)
        if len(gone) and len(places):
            dropped = pc.is_in(partition.items.take(pa.array(places)), gone)
            alive[places] = ~dropped.to_numpy(zero_copy_only=False)
    owners = np.repeat(np.arange(len(partition.users)), partition.lengths)
    stays = alive[partition.codes]
    lengths = np.bincount(owners[stays], minlength=len(partition.users))
    kept_users = lengths >= min_user_interactions
    stays &= kept_users[owners]
    new_code = (np.cumsum(alive) - 1).astype(np.int32)
    return replace(
        partition,
        users=partition.users.filter(pa.array(kept_users)),
        hashes=partition.hashes[kept_users],
        lengths=lengths[kept_users],
        items=partition.items.filter(pa.array(alive)),
        codes=new_code[partition.codes[stays]],
        times=None if partition.times is None else partition.times[stays],
    )


def sequences_table(
    partition: Partition, id_tables: Iterable[pa.Table], num_buckets: int
) -> pa.Table:
    """One row a user in the partition's order: user, items, timestamps if any, and hash.

    Args:
        partition: The interactions.
        id_tables: For each bucket of items, item and item_id; one is held at a time.
        num_buckets: How many buckets there are.
    """
    item_ids = np.zeros(len(partition.items), np.int32)
    buckets = item_buckets(partition.items, num_buckets)
    for bucket, table in enumerate(id_tables):
        places = np.flatnonzero(buckets == bucket)
        found = pc.index_in(partition.items.take(pa.array(places)), table.column("item"))
        known = found.is_valid().to_numpy(zero_copy_only=False)
        ids = table.column("item_id").take(found.drop_null())
        item_ids[places[known]] = ids.to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(partition.lengths)]), pa.int32())
    items = pa.ListArray.from_arrays(offsets, pa.array(item_ids[partition.codes], pa.int32()))
    columns = {"user": partition.users, "items": items}
    if partition.times is not None:
        columns["timestamps"] = pa.ListArray.from_arrays(offsets, pa.array(partition.times))
    return pa.table({**columns, "hash": pa.array(partition.hashes)})
