"""Dense item ids by falling count, ties by the caller's id, without all items in one place.

Items come in buckets of their hash. Each bucket is sorted; splitters drawn from samples cut the
order of (falling count, rising id) into ranges; each range is numbered from where the one before
it ends.
"""
# Arrow makes its compute functions when it is imported, where pyright cannot see them.
# pyright: reportAttributeAccessIssue=false

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Splitter = tuple[int, int | str]
"""Count and item of the first row of a range."""

_SAMPLES = 64


def merge_counts(tables: Sequence[pa.Table]) -> pa.Table:
    """One bucket's items and counts, in the order of (falling count, rising id).

    Args:
        tables: Of item and count, which add up.
    """
    counted = pa.concat_tables(tables).group_by("item").aggregate([("count", "sum")])
    return counted.rename_columns({"count_sum": "count"}).sort_by(
        [("count", "descending"), ("item", "ascending")]
    )


def rare_items(tables: Sequence[pa.Table], min_interactions: int) -> pa.Array:
    """The items of one bucket that occur less often than `min_interactions`."""
    counted = pa.concat_tables(tables).group_by("item").aggregate([("count", "sum")])
    rare = counted.filter(pc.less(counted.column("count_sum"), min_interactions))
    return rare.column("item").combine_chunks()


def sample(ordered: pa.Table) -> list[Splitter]:
    """A few evenly spaced rows of a bucket."""
    num_rows = ordered.num_rows
    places = np.unique(np.linspace(0, num_rows - 1, min(num_rows, _SAMPLES)).astype(np.int64))
    rows = ordered.take(pa.array(places))
    return list(zip(rows["count"].to_pylist(), rows["item"].to_pylist(), strict=True))


def choose_splitters(samples: Sequence[Splitter], num_ranges: int) -> list[Splitter]:
    """Up to num_ranges - 1 rows that cut the order into ranges of about equal size."""
    ordered = sorted(samples, key=lambda row: (-row[0], row[1]))
    cuts = [ordered[len(ordered) * place // num_ranges] for place in range(1, num_ranges)]
    return list(dict.fromkeys(cuts))


def split_ranges(ordered: pa.Table, splitters: Sequence[Splitter]) -> list[pa.Table]:
    """A sorted bucket cut at the splitters, each of which begins the range after it."""
    counts, items = ordered.column("count"), ordered.column("item")
    cuts = [0]
    for count, item in splitters:
        before = pc.or_(
            pc.greater(counts, count), pc.and_(pc.equal(counts, count), pc.less(items, item))
        )
        cuts.append(pc.sum(before).as_py() or 0)
    cuts.append(ordered.num_rows)
    return [
        ordered.slice(start, end - start).combine_chunks()
        for start, end in itertools.pairwise(cuts)
    ]


def number_items(tables: Sequence[pa.Table], first_id: int) -> pa.Table:
    """A range's items with their dense ids: item_id, item and count, in order.

    Args:
        tables: One from each bucket.
        first_id: The dense id of the range's first item.
    """
    ordered = pa.concat_tables(tables).sort_by([("count", "descending"), ("item", "ascending")])
    ids = pa.array(np.arange(first_id, first_id + ordered.num_rows, dtype=np.int32))
    return pa.table(
        {"item_id": ids, "item": ordered.column("item"), "count": ordered.column("count")}
    )
