"""How a log is cut for its size, without a log of that size."""

import pyarrow as pa
import pytest

from distrl.data.prepare_config import PrepareConfig
from distrl.data.prepare_sizes import derived_partitions, reading_bytes, unit_bytes
from distrl.data.prepare_tasks import _chunks

MB = 2**20


def config(**changes):
    return PrepareConfig.model_validate({"store_uri": "s", "source": {"uri": "x.csv"}, **changes})


@pytest.mark.parametrize(
    ("megabytes", "limit", "partitions"),
    [
        (1, 2, 1),
        (100, 2, 4),
        (100, 64, 13),  # of 8 MB each at least
        (10_000, 2, 40),  # of 256 MB
        (10_000, 512, 256),  # not 1,024: a chunk of 64 MB would give each a piece of 64 KB
        (400_000, 512, 1_563),
        (5_000_000, 512, 4_096),
    ],
)
def test_partitions_follow_the_size_and_the_cpus_but_not_into_crumbs(megabytes, limit, partitions):
    assert derived_partitions(config(), megabytes, limit) == partitions
    assert derived_partitions(config(num_partitions=7), megabytes, limit) == 7


def test_a_chunk_gives_each_of_many_partitions_more_than_ray_hands_to_the_driver():
    assert reading_bytes(config(), 4) == reading_bytes(config(), 256) == 64 * MB
    assert reading_bytes(config(), 1_563) == 1_563 * MB // 4
    assert reading_bytes(config(chunk_mb=512), 1_563) == 512 * MB


@pytest.mark.parametrize(
    ("filters", "megabytes", "chunks"),
    [
        ({}, 400_000, 1),
        ({"event_types": ["buy"]}, 400_000, 8),
        ({"time_from": "2026-01-01"}, 64 * 4 * 16 * 3, 3),  # as many for each of 16 tasks, 4 times
        ({"min_rating": 4}, 1_000, 1),  # all tasks have work
    ],
)
def test_what_filters_leave_of_a_piece_of_work_is_no_crumb(filters, megabytes, chunks):
    source = {"uri": "x.csv", "event_type": "kind", "rating": "stars"}
    asked = config(source=source, filters=filters)
    assert unit_bytes(asked, 64 * MB, megabytes * MB, 16) == chunks * 64 * MB


class Cleaner:
    """Parts that are numbers of rows, read as tables of eight bytes a row."""

    def clean(self, part, counts):
        yield pa.table({"user": pa.array(range(part), pa.int64())})


@pytest.mark.parametrize(
    ("parts", "chunks"),
    [
        ([], []),
        ([0, 0], []),
        ([3], [3]),
        ([10], [10]),
        ([9, 2, 10, 1], [11, 11]),  # a single row is no chunk
        ([10, 10, 10], [10, 10, 10]),
        ([10, 0, 5, 4], [19]),
    ],
)
def test_what_is_left_of_a_unit_goes_with_its_last_chunk(parts, chunks):
    found = list(_chunks(Cleaner(), parts, None, 80))
    assert [table.num_rows for table in found] == chunks
