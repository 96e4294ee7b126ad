import numpy as np
import pyarrow as pa
import pytest

from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.semantics import window_vectors
from distrl.semantics.embed_config import WindowsConfig
from distrl.semantics.window_vectors import joined, means, most_windows, shard_windows
from tests.store_factory import make_store


def test_a_mean_is_that_of_the_items_shown():
    vectors = np.array([[9, 9], [1, 0], [0, 4], [5, 5]], dtype=np.float32)
    shown = Ragged.of([[1], [1, 2], [3, 3, 1, 2]])
    expected = [[1, 0], [0.5, 2], [11 / 4, 14 / 4]]
    assert means(vectors, shown).tolist() == expected


def test_blocks_do_not_change_means_and_equal_windows_have_equal_ones(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 8)).astype(np.float32)
    rows = [rng.integers(1, 50, length).tolist() for length in rng.integers(1, 30, 200)]
    rows[150] = rows[3]
    whole = means(vectors, Ragged.of(rows))
    monkeypatch.setattr(window_vectors, "_NUMBERS_AT_ONCE", 8 * 20)  # some rows are longer
    assert np.array_equal(means(vectors, Ragged.of(rows)), whole)
    assert np.array_equal(whole[150], whole[3])
    by_hand = np.stack([vectors[row].astype(np.float64).mean(axis=0) for row in rows])
    assert np.abs(whole - by_hand).max() < 1e-6


def test_joined_texts_have_the_newest_item_first_and_pass_over_the_textless():
    texts = pa.array(["one", "two", None])
    shown = Ragged.of([[1, 2, 1], [2, 3, 1], [3], [3, 3]])
    assert joined(texts, shown) == ["one; two; one", "one; two", None, None]


def test_the_windows_of_a_shard_are_numbered_through_its_row_groups(tmp_path):
    sequences = [[1, 2, 3, 4, 5], [1, 2], [5, 4, 3, 2], [1, 2, 3, 4, 5, 1]]
    manifest = make_store(tmp_path, sequences, num_shards=1, row_group_rows=2)
    (shard,) = manifest.sequences

    def windows(**settings):
        config = WindowsConfig(**settings)
        groups = list(shard_windows(str(tmp_path), manifest, shard, config))
        assert [first for _, _, first in groups] == [0, 2]
        found = [
            (row + first, length)
            for _, some, first in groups
            for row, length in zip(some.row.tolist(), some.length.tolist(), strict=True)
        ]
        assert len(found) <= most_windows(shard, config)
        return found

    assert windows(which="every") == [(0, 1), (0, 2), (2, 1), (3, 1), (3, 2), (3, 3)]
    assert windows(which="last") == [(0, 2), (2, 1), (3, 3)]
    held_out = windows(which="last", held_out=True)
    assert held_out == [
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 1),
        (2, 1),
        (2, 2),
        (2, 3),
        (3, 3),
        (3, 4),
        (3, 5),
    ]
    assert len(windows(which="every", held_out=True)) == 4 + 1 + 3 + 5


def test_a_shard_of_other_items_is_refused(tmp_path):
    manifest = make_store(tmp_path, [[1, 2, 3, 9]], num_shards=1).model_copy(
        update={"num_items": 8}
    )
    with pytest.raises(SchemaError, match="items 1 to 9, its manifest says 1 to 8"):
        list(shard_windows(str(tmp_path), manifest, manifest.sequences[0], WindowsConfig()))
