import numpy as np
import pyarrow as pa
import pytest

from distrl.data.dense_ids import (
    choose_splitters,
    merge_counts,
    number_items,
    rare_items,
    sample,
    split_ranges,
)


def test_counts_add_up_and_ties_go_by_the_callers_id():
    tables = [
        pa.table({"item": ["b", "a", "c"], "count": [2, 1, 3]}),
        pa.table({"item": ["a", "d"], "count": [1, 2]}),
    ]
    assert merge_counts(tables).to_pydict() == {"item": ["c", "a", "b", "d"], "count": [3, 2, 2, 2]}
    assert sorted(rare_items(tables, 3).to_pylist()) == ["a", "b", "d"]
    assert rare_items(tables, 1).to_pylist() == []


@pytest.mark.parametrize("num_buckets", [1, 2, 7])
def test_ids_do_not_depend_on_the_number_of_buckets(num_buckets):
    rng = np.random.default_rng(3)
    counts = dict(enumerate(rng.integers(1, 9, 500).tolist()))
    expected = sorted(counts, key=lambda item: (-counts[item], item))
    buckets = [
        merge_counts([pa.table({"item": items, "count": [counts[item] for item in items]})])
        for items in (list(counts)[start::num_buckets] for start in range(num_buckets))
    ]
    splitters = choose_splitters([row for table in buckets for row in sample(table)], num_buckets)
    ranges = list(zip(*(split_ranges(table, splitters) for table in buckets), strict=True))
    numbered, first = [], 1
    for parts in ranges:
        numbered.append(number_items(parts, first))
        first += numbered[-1].num_rows
    table = pa.concat_tables(numbered)
    assert table["item"].to_pylist() == expected
    assert table["item_id"].to_pylist() == list(range(1, 501))
    assert table.schema.field("item_id").type == pa.int32()


def test_more_ranges_than_items_leave_ranges_empty():
    table = merge_counts([pa.table({"item": [7], "count": [1]})])
    parts = split_ranges(table, choose_splitters(sample(table), 4))
    assert [part.num_rows for part in parts] == [0, 1]
