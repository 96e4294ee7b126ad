"""Neighbors on their way from a table beside the store into batches."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from distrl.contract import Packed
from distrl.data.beside import Beside, beside_hashes, check_beside, read_beside
from distrl.data.config import AugmentConfig, DataConfig
from distrl.data.found import Found
from distrl.data.neighbor_batch import neighbors_of
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker, empty_batch
from distrl.data.side_tables import SideManifest, write_manifest
from distrl.data.store import manifest_hash
from distrl.data.stream import local_batches
from distrl.errors import ConfigError, SchemaError
from distrl.ops.ragged import Ragged
from tests.neighbor_store import near_items, neighbor_store, vector_of, whose

LENGTHS = [5, 12, 3, 7, 20, 4, 6, 9, 8, 2, 11]
K, MAX_LEN, E = 3, 8, 4


@pytest.fixture
def near(tmp_path):
    return (tmp_path / "store", *neighbor_store(tmp_path / "store", LENGTHS))


def config_of(folder, **settings):
    given = {"neighbors": "near", "num_neighbors": K, "max_len": MAX_LEN, "batch_size": 4}
    return DataConfig(store_uri=str(folder), **given | settings)


def maker_of(config, manifest, table, views=True):
    beside = read_beside(config, manifest)
    near = beside.near_items if views else None
    return BatchMaker(config, 0, manifest.num_items, 0, neighbors=table, near_items=near)


def all_batches(config, manifest, maker, epochs=1):
    stream = local_batches(
        manifest, config, maker, epochs=epochs, ledger=Ledger(manifest_hash(manifest))
    )
    return list(stream)


def up_to(packed: Packed, at: int) -> list[int]:
    """Items of a segment up to a slot, oldest first."""
    place = int(packed.position.flatten()[at])
    return packed.items.flatten()[at - place : at + 1].tolist()


SAMPLING = {
    "whole histories": {},
    "three prefixes": {"contrasted_prefixes": 3},
    "three prefixes, newest items": {"contrasted_prefixes": 3, "long_sequences": "last"},
    "prefix": {"samples": "prefix"},
}


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
def test_each_prefix_comes_with_the_neighbors_that_the_table_has_for_it(near, settings):
    folder, manifest, table, chosen = near
    config = config_of(folder, **settings)
    seen = 0
    for batch, _ in all_batches(config, manifest, maker_of(config, manifest, table), epochs=2):
        found = batch.neighbors
        for pair, at in enumerate(found.anchors.last.tolist()):
            shown = up_to(found.anchors, at)
            user, length = whose(shown[-1])
            assert shown == [user * 50 + i for i in range(length - len(shown) + 1, length + 1)]
            assert found.text[pair].tolist() == vector_of((user, length), E)
            rows = [row for row in found.of_pair[pair].tolist() if row >= 0]
            places = [found.sequences.last[row].item() for row in rows]
            read = [up_to(found.sequences, place) for place in places]
            assert [whose(items[-1]) for items in read] == chosen[user, length]
            assert [len(items) for items in read] == [
                min(n, MAX_LEN) for _, n in chosen[user, length]
            ]
            texts = [found.neighbor_text[row].tolist() for row in rows]
            assert texts == [vector_of(window, E) for window in chosen[user, length]]
            seen += 1
    # Two epochs of users with a target; each has a whole history, and shorter prefixes as asked.
    trainable = [n - 3 for n in LENGTHS if n > 3]
    per_user = {1: 1, 3: 3}[settings.get("contrasted_prefixes", 1)]
    expected = [min(n, MAX_LEN if "long_sequences" in settings else n) for n in trainable]
    if settings.get("samples") == "prefix":
        assert seen == 2 * sum(trainable)
    else:
        assert seen == 2 * sum(min(n, per_user) for n in expected)


def test_a_neighbor_of_many_is_held_once_and_prefixes_of_one_user_share_a_segment(near):
    folder, manifest, table, _ = near
    config = config_of(folder, batch_size=100, contrasted_prefixes=4)
    ((batch, _),) = all_batches(config, manifest, maker_of(config, manifest, table))
    found = batch.neighbors
    windows = [whose(up_to(found.sequences, at)[-1]) for at in found.sequences.last.tolist()]
    assert len(windows) == len(set(windows)) == len(found.neighbor_text)
    assert (found.of_pair >= 0).sum() > len(windows)
    num_segments = int(found.sequences.segment.max()) + 1
    short = {user for user, length in windows if length <= MAX_LEN}
    long = [window for window in windows if window[1] > MAX_LEN]
    assert num_segments == len(short) + len(long)
    assert len(windows) > num_segments


def test_semantic_views_replace_the_asked_share_and_nothing_else(near):
    folder, manifest, table, _ = near
    share = AugmentConfig(semantic_share=0.5)
    config = config_of(folder, batch_size=100, augment=share, contrasted_prefixes=4)
    ((batch, _),) = all_batches(config, manifest, maker_of(config, manifest, table))
    anchors = batch.neighbors.anchors
    changed = total = 0
    first, second = batch.semantic_views
    for view in (first, second):
        assert (view.items[anchors.segment < 0] == 0).all()
        for at in range(anchors.items.numel()):
            if anchors.segment.flatten()[at] < 0:
                continue
            was, is_now = anchors.items.flatten()[at].item(), view.items.flatten()[at].item()
            total += 1
            if was != is_now:
                changed += 1
                assert is_now in near_items(was, manifest.num_items, K)
    assert not bool((first.items == second.items).all())
    assert 0.4 < changed / total < 0.6


def test_nothing_is_drawn_for_a_method_that_wants_none(near):
    folder, manifest, _, _ = near
    config = config_of(folder)
    plain = BatchMaker(config, 0, manifest.num_items, 0)
    for batch, _ in all_batches(config, manifest, plain):
        assert batch.neighbors is None
        assert batch.semantic_views is None
        assert batch.num_pairs == 0


def test_the_empty_batch_of_a_rank_that_ran_out_has_vectors_of_the_right_width(near):
    folder, manifest, table, _ = near
    config = config_of(folder)
    batch = empty_batch(maker_of(config, manifest, table))
    assert batch.neighbors.text.shape == (0, E)
    assert batch.neighbors.neighbor_text.shape == (0, E)
    assert batch.num_pairs == 0


def test_fewer_neighbors_may_be_taken_than_are_listed(near):
    folder, manifest, table, chosen = near
    config = config_of(folder, num_neighbors=1)
    for batch, _ in all_batches(config, manifest, maker_of(config, manifest, table)):
        found = batch.neighbors
        assert found.of_pair.shape[1] == 1
        for pair, at in enumerate(found.anchors.last.tolist()):
            own = whose(up_to(found.anchors, at)[-1])
            rows = [row for row in found.of_pair[pair].tolist() if row >= 0]
            read = [whose(up_to(found.sequences, found.sequences.last[r])[-1]) for r in rows]
            assert read == chosen[own][:1]


def test_one_neighbor_is_drawn_of_the_nearest_and_another_one_in_another_epoch(near):
    folder, manifest, table, chosen = near
    config = config_of(folder, num_neighbors=2)
    maker = replace(maker_of(config, manifest, table), draws_neighbor=True)
    seen = defaultdict(set)
    for batch, _ in all_batches(config, manifest, maker, epochs=40):
        found = batch.neighbors
        assert found.of_pair.shape[1] == 1
        for pair, at in enumerate(found.anchors.last.tolist()):
            own = whose(up_to(found.anchors, at)[-1])
            row = found.of_pair[pair, 0].item()
            read = None
            if row >= 0:
                read = whose(up_to(found.sequences, found.sequences.last[row])[-1])
            seen[own].add(read)
    assert len(seen) > 2
    for own, read in seen.items():
        assert read == (set(chosen[own][:2]) or {None})
    assert any(len(read) == 2 for read in seen.values())


def test_windows_cut_to_the_newest_items_are_no_ones_prefix():
    # Window 1 shows items 3 to 6 of its user, whose window 0 shows items 1 to 4.
    found = Found(
        np.zeros((1, 2), dtype=np.float16),
        np.array([2]),
        np.array([7, 9]),
        np.array([4, 4]),
        np.array([4, 6]),
        Ragged.of([[1, 2, 3, 4], [3, 4, 5, 6]]),
        np.zeros((2, 2), dtype=np.float16),
    )
    made = neighbors_of(found, Ragged.of([[8]]), most=2, row_length=4)
    assert [up_to(made.sequences, at) for at in made.sequences.last.tolist()] == [
        [1, 2, 3, 4],
        [3, 4, 5, 6],
    ]
    assert made.of_pair.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"neighbors": "far"}, "no such table; make it: python jobs/retrieve.py"),
        ({"max_len": 9}, "the windows of data.neighbors=near show 8 items; set data.max_len=8"),
        ({"num_neighbors": 4}, "neighbors/near lists 3; retrieve again with num_neighbors=4"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_on_the_driver(near, settings, said):
    folder, manifest, _, _ = near
    with pytest.raises(ConfigError, match="data") as caught:
        check_beside(config_of(folder, **settings), manifest)
    assert said in str(caught.value)


def test_shorter_prefixes_need_a_table_that_knows_them(tmp_path):
    manifest, _, _ = neighbor_store(tmp_path / "store", LENGTHS, windows="last")
    check_beside(config_of(tmp_path / "store"), manifest)
    for settings in ({"samples": "prefix"}, {"contrasted_prefixes": 2}):
        with pytest.raises(ConfigError, match="knows the last window of each user alone"):
            check_beside(config_of(tmp_path / "store", **settings), manifest)


def test_last_windows_serve_whole_histories(tmp_path):
    manifest, table, chosen = neighbor_store(tmp_path / "store", LENGTHS, windows="last")
    config = config_of(tmp_path / "store")
    seen = {}
    for batch, _ in all_batches(config, manifest, maker_of(config, manifest, table)):
        found = batch.neighbors
        for pair, at in enumerate(found.anchors.last.tolist()):
            own = whose(up_to(found.anchors, at)[-1])
            rows = [row for row in found.of_pair[pair].tolist() if row >= 0]
            last = [found.sequences.last[r] for r in rows]
            seen[own] = [whose(up_to(found.sequences, at)[-1]) for at in last]
    assert seen == chosen


def test_what_a_run_was_made_of_names_the_table_that_it_reads(near):
    folder, manifest, table, _ = near
    assert beside_hashes(config_of(folder), manifest) == {"neighbors_table": table.content_hash}
    assert beside_hashes(config_of(folder, neighbors=None), manifest) == {}


def test_a_table_of_another_store_or_a_torn_one_is_refused(near):
    folder, manifest, table, _ = near
    other = SideManifest.model_validate({**table.model_dump(), "store_hash": "0"})
    write_manifest(str(folder), "near", other)
    with pytest.raises(SchemaError, match="made of another store"):
        check_beside(config_of(folder), manifest)
    write_manifest(str(folder), "near", table)
    pool = folder / table.pools[0].path
    pool.write_bytes(pool.read_bytes()[:-7])
    with pytest.raises(SchemaError, match="bytes, its manifest says"):
        check_beside(config_of(folder), manifest)
    config = config_of(folder)
    maker = BatchMaker(config, 0, manifest.num_items, 0, neighbors=table)
    with pytest.raises(SchemaError, match=r"pool/part-00000\.parquet"):
        all_batches(config, manifest, maker)


@pytest.mark.parametrize("kind", ["window_parts", "pools"])
def test_a_part_that_changed_in_place_ends_the_reading_unless_told_not_to_look(near, kind):
    folder, manifest, table, _ = near
    place = folder / getattr(table, kind)[1].path
    content = bytearray(place.read_bytes())
    # In the footer's key-value metadata: the size and all numbers stay.
    at = content.rindex(b"ARROW:schema")
    content[at] ^= 1
    place.write_bytes(bytes(content))
    config = config_of(folder)
    with pytest.raises(SchemaError, match=r"part-00001\.parquet has sha256"):
        all_batches(config, manifest, maker_of(config, manifest, table))
    config = config_of(folder, verify_checksums=False)
    assert all_batches(config, manifest, maker_of(config, manifest, table))


def test_without_a_name_nothing_is_read(near):
    folder, manifest, _, _ = near
    assert read_beside(DataConfig(store_uri=str(folder)), manifest) == Beside()
