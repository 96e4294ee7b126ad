"""A hash of ids that is the same on every machine and in every version: FNV-1a, then SplitMix64."""
# Arrow makes its compute functions when it is imported, where pyright cannot see them.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pyarrow as pa

_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def hash_ids(ids: pa.Array, seed: int) -> np.ndarray:
    """A uint64 for each id, spread evenly over all of them; no id may be null.

    Integers never collide. Another seed gives another, unrelated order.
    """
    key = _split_mix(np.array([seed], np.uint64))[0]
    if pa.types.is_integer(ids.type):
        return _split_mix(ids.to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64) ^ key)
    return _split_mix(_fnv_1a(ids.cast(pa.large_binary())) ^ key)


def slot(hashes: np.ndarray, num_slots: int) -> np.ndarray:
    """The range that each hash falls into when all hashes are cut into equal ranges."""
    return ((hashes >> np.uint64(32)) * np.uint64(num_slots) >> np.uint64(32)).astype(np.int64)


def slot_of(hashed: int, num_slots: int) -> int:
    """The range that one hash falls into; see `slot`."""
    return (hashed >> 32) * num_slots >> 32


def _split_mix(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _fnv_1a(ids: pa.LargeBinaryArray) -> np.ndarray:
    """Byte by byte over all ids at once: the loop is as long as the longest id."""
    if len(ids) == 0:
        return np.empty(0, np.uint64)
    _, offsets_buffer, bytes_buffer = ids.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    content = np.frombuffer(bytes_buffer or b"", np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    # Longest first, so that the ids that still have a byte are always a head of the array.
    order = np.argsort(-lengths, kind="stable")
    starts, negative = starts[order], -lengths[order]
    mixed = np.full(len(ids), _FNV_OFFSET)
    with np.errstate(over="ignore"):
        for place in range(-int(negative[0])):
            left = int(np.searchsorted(negative, -place))
            byte = content[starts[:left] + place].astype(np.uint64)
            mixed[:left] = (mixed[:left] ^ byte) * _FNV_PRIME
    hashes = np.empty_like(mixed)
    hashes[order] = mixed
    return hashes
