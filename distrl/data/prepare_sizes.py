"""How a log is cut for its size: groups of users, chunks of events, and pieces of work."""

import math

from distrl.data.prepare_config import FiltersConfig, PrepareConfig

_MB = 1 << 20
_SMALLEST_PARTITION_MB = 8
_MAX_PARTITIONS = 4096
_PIECE_KB = 256
"""Least size of what one chunk of events gives to one partition, about: Ray hands results below 100
KB to the driver itself, which would hold the whole log."""

_FILTERED_CHUNKS = 8
"""Chunks that a reading task goes through where filters may leave an eighth of what it reads."""


def derived_partitions(config: PrepareConfig, megabytes: float, limit: int) -> int:
    """Groups of users: small enough for a task, and for many CPUs more, but not into crumbs.

    Args:
        config: May say it outright.
        megabytes: Of all rows in memory.
        limit: Tasks at a time.
    """
    if config.num_partitions is not None:
        return config.num_partitions
    needed = math.ceil(megabytes / config.partition_mb)
    crumbs = max(1, config.chunk_mb * 1024 // _PIECE_KB)
    for_speed = min(2 * limit, math.ceil(megabytes / _SMALLEST_PARTITION_MB), crumbs)
    return min(max(needed, for_speed, 1), _MAX_PARTITIONS)


def reading_bytes(config: PrepareConfig, num_partitions: int) -> int:
    """Bytes of events in a chunk: chunk_mb, or more where partitions are many."""
    return max(config.chunk_mb * _MB, num_partitions * _PIECE_KB * 1024)


def unit_bytes(config: PrepareConfig, chunk_bytes: int, all_bytes: float, limit: int) -> int:
    """Bytes of events that a reading task goes through, in chunks of chunk_bytes or more.

    More where filters leave few of them, so that a task's only chunk is no crumb, as long as all
    tasks have work.
    """
    if config.filters == FiltersConfig():
        return chunk_bytes
    a_quarter_of_a_turn = int(all_bytes / (4 * limit))
    return max(chunk_bytes, min(_FILTERED_CHUNKS * chunk_bytes, a_quarter_of_a_turn))
