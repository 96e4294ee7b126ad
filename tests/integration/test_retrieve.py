"""Tables of neighbors on a real local Ray, against a loop over all pairs."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from distrl.data.side_tables import find_table
from distrl.data.store import read_manifest
from distrl.errors import ConfigError, SchemaError, StorageError
from distrl.semantics.retrieve import retrieve
from distrl.semantics.retrieve_config import RetrieveConfig
from jobs.retrieve import main, summary
from tests.embeddings_factory import make_embeddings, windows_of_store
from tests.integration.servers import ray_here
from tests.store_factory import make_store

pytestmark = pytest.mark.slow

NUM_ITEMS, DIMENSION, MAX_LEN = 40, 6, 4


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_here():
        yield


@pytest.fixture(scope="module")
def sequences():
    """One of three shards, and a row group of another, has no training window."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 12, 45)
    lengths[2::3] = 3
    lengths[[0, 3, 6, 9]] = 3
    return [rng.integers(1, NUM_ITEMS + 1, length).tolist() for length in lengths]


def vectors_of(count, seed):
    """Some of them alike, one of them of a text that is missing."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, DIMENSION)).astype(np.float16)
    vectors[count // 2 : count // 2 + count // 4] = vectors[: count // 4]
    vectors[count // 3] = 0
    return vectors


def made(folder, sequences, which="every"):
    """A store with embeddings that have held-out windows."""
    make_store(folder, sequences, num_shards=3, row_group_rows=4, num_items=NUM_ITEMS)
    store = str(folder)
    shards = windows_of_store(store, which, held_out=True)
    keys = [(s, row, length) for s, found in enumerate(shards) for row, length, _ in found]
    vectors = dict(zip(keys, vectors_of(len(keys), 1), strict=True))
    make_embeddings(
        store,
        vectors_of(NUM_ITEMS, 2),
        lambda *key: vectors[key],
        which=which,
        held_out=True,
        max_len=MAX_LEN,
        num_parts=2,
    )
    return store, vectors


def run(store, **settings):
    config = RetrieveConfig(store_uri=store, embeddings="e", **settings)
    return retrieve(config, say=lambda line: None)


def nearest_by_loop(own, candidates, num_neighbors):
    """Keys of the most similar of (key, vector), the earlier of two alike first."""
    unit = own.astype(np.float64) / np.linalg.norm(own.astype(np.float64))
    scored = []
    for place, (key, vector) in enumerate(candidates):
        norm = np.linalg.norm(vector.astype(np.float64))
        if norm > 0:
            scored.append((-round(float(unit @ (vector / norm)), 6), place, key))
    return [key for _, _, key in sorted(scored)[:num_neighbors]]


def expected_windows(store, vectors, which, num_neighbors, *, same_user, held_out):
    """For each training window the keys of its neighbors."""
    pool = {}
    for shard, found in enumerate(windows_of_store(store, which, held_out=held_out)):
        for row, length, sequence in found:
            pool[shard, row, length] = sequence
    expected = {}
    for (shard, row, length), sequence in pool.items():
        if length > len(sequence) - 3:
            continue
        others = [
            (key, vectors[key])
            for key in pool
            if key != (shard, row, length) and (same_user or key[:2] != (shard, row))
        ]
        own = vectors[shard, row, length]
        found = nearest_by_loop(own, others, num_neighbors) if own.any() else []
        expected[shard, row, length] = found
    return expected, pool


def check_windows(store, vectors, which, num_neighbors, *, same_user, held_out):
    """Every row of the table, and how it is cut into row groups."""
    expected, pool = expected_windows(
        store, vectors, which, num_neighbors, same_user=same_user, held_out=held_out
    )
    numbers = {key: number for number, key in enumerate(pool)}
    table, manifest = find_table(store, "neighbors", "e"), read_manifest(store)
    before, seen = 0, set()
    starts = [0, *np.cumsum([shard.rows for shard in manifest.sequences]).tolist()]
    for shard, sequences in enumerate(manifest.sequences):
        files = [
            pq.ParquetFile(f"{store}/{part.path}")
            for part in (sequences, table.window_parts[shard], table.pools[shard])
        ]
        assert len({file.num_row_groups for file in files}) == 1
        before = 0
        for group in range(files[0].num_row_groups):
            users, windows, pooled = (file.read_row_group(group) for file in files)
            pooled = pooled.to_pylist()
            assert len({row["window"] for row in pooled}) == len(pooled)
            used = set()
            for window in windows.to_pylist():
                key = (shard, window["row"], window["length"])
                assert before <= key[1] < before + len(users)
                assert np.array_equal(np.float16(window["vector"]), vectors[key])
                found = [pooled[place] for place in window["neighbors"]]
                wanted = expected[key]
                assert [row["window"] for row in found] == [numbers[key] for key in wanted]
                assert [row["user"] for row in found] == [starts[s] + row for s, row, _ in wanted]
                assert [row["length"] for row in found] == [length for _, _, length in wanted]
                shown = [pool[other][: other[2]][-MAX_LEN:] for other in wanted]
                assert [row["items"] for row in found] == shown
                for row, other in zip(found, wanted, strict=True):
                    assert np.array_equal(np.float16(row["vector"]), vectors[other])
                used.update(window["neighbors"])
                seen.add(key)
            assert used == set(range(len(pooled)))
            before += len(users)
    assert seen == set(expected)
    return expected


def items_of(store, name="e"):
    table = find_table(store, "neighbors", name)
    rows = [
        row for part in table.items for row in pq.read_table(f"{store}/{part.path}").to_pylist()
    ]
    assert [row["item_id"] for row in rows] == list(range(1, NUM_ITEMS + 1))
    return [row["neighbors"] for row in rows]


@pytest.mark.parametrize("which", ["every", "last"])
@pytest.mark.parametrize("same_user", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_table_is_what_a_loop_over_all_pairs_finds(
    sequences, tmp_path, which, same_user, held_out
):
    store, vectors = made(tmp_path / "store", sequences, which)
    table = run(store, num_neighbors=5, exclude_same_user=not same_user, held_out=held_out)
    options = {"same_user": same_user, "held_out": held_out}
    expected = check_windows(store, vectors, which, 5, **options)
    shares = {name: table.facts[f"windows_{name}_share"] for name in ("same_user", "held_out")}
    assert (shares["held_out"] > 0) == held_out
    assert (shares["same_user"] > 0) == (same_user and (which == "every" or held_out))
    assert table.facts["windows_short"] == sum(len(found) < 5 for found in expected.values())
    assert sum(part.rows for part in table.window_parts) == len(expected)
    vectors = vectors_of(NUM_ITEMS, 2)
    for item, found in enumerate(items_of(store), start=1):
        others = [(i + 1, vectors[i]) for i in range(NUM_ITEMS) if i + 1 != item]
        own = vectors[item - 1]
        assert found == (nearest_by_loop(own, others, 5) if own.any() else [])


def test_a_pool_smaller_than_asked_for_gives_shorter_lists(sequences, tmp_path):
    store, vectors = made(tmp_path / "store", sequences[:9])
    table = run(store, num_neighbors=50)
    expected = check_windows(store, vectors, "every", 50, same_user=False, held_out=False)
    assert table.facts["windows_short"] == len(expected) > 0
    assert table.facts["items_short"] == NUM_ITEMS
    assert {len(found) for found in items_of(store)} == {0, NUM_ITEMS - 2}


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("most_more", [1, 64])
def test_an_index_that_looks_everywhere_finds_what_exact_search_finds(
    sequences, tmp_path, index, most_more
):
    store, vectors = made(tmp_path / "store", sequences)
    table = run(
        store,
        num_neighbors=5,
        index=index,
        num_lists=4,
        num_probes=4,
        ef_search=500,
        most_more=most_more,
        recall_sample=50,
    )
    check_windows(store, vectors, "every", 5, same_user=False, held_out=False)
    said = summary(RetrieveConfig(store_uri=store, embeddings="e"), table, 1.25).splitlines()
    count = table.facts["windows_recall_queries"]
    assert f"recall 1.0 on {count} queries" in next(x for x in said if x.startswith("windows"))
    assert said[-1] == "time              1.2 s"
    for what in ("items", "windows"):
        assert table.facts[f"{what}_recall"] == 1
        assert 0 < table.facts[f"{what}_recall_queries"] <= 50
        assert table.facts[f"{what}_index"] == index


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_several_indexes_find_what_one_finds(sequences, tmp_path, index):
    store, vectors = made(tmp_path / "store", sequences)
    table = run(
        store,
        num_neighbors=5,
        index=index,
        num_lists=4,
        num_probes=4,
        ef_search=500,
        vectors_per_index=60,
        recall_sample=50,
    )
    check_windows(store, vectors, "every", 5, same_user=False, held_out=False)
    assert table.facts["items_indexes"] == 1
    # No two parts have 60 windows together: each has an index of its own.
    assert table.facts["windows_indexes"] == 3
    assert table.facts["windows_recall"] == 1
    said = summary(RetrieveConfig(store_uri=store, embeddings="e"), table, 1.0)
    assert "3 indexes of " in said


def test_a_run_that_fails_is_followed_by_one_that_searches_for_what_is_missing(sequences, tmp_path):
    store, _ = made(tmp_path / "store", sequences)
    whole = run(store, name="whole", num_neighbors=5, queries_per_task=7)
    in_the_way = tmp_path / "store" / "neighbors" / "e" / "pool"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    with pytest.raises(StorageError, match="pool"):
        run(store, num_neighbors=5, queries_per_task=7)
    assert find_table(store, "neighbors", "e") is None
    in_the_way.unlink()
    kept = sorted((tmp_path / "store" / "neighbors" / "e" / "found").glob("*/windows-*.npz"))
    assert len(kept) > 5
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-40])
    lines = []
    config = RetrieveConfig(store_uri=store, embeddings="e", num_neighbors=5, queries_per_task=7)
    again = retrieve(config, say=lines.append)
    assert f"{len(kept) - 2} of {len(kept)} searches were done by an earlier run" in lines
    assert again.content_hash == whole.content_hash
    assert not (tmp_path / "store" / "neighbors" / "e" / "found").exists()


def test_what_was_found_with_other_settings_is_not_taken_over(sequences, tmp_path):
    store, vectors = made(tmp_path / "store", sequences)
    in_the_way = tmp_path / "store" / "neighbors" / "e" / "items"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    with pytest.raises(StorageError, match="items"):
        run(store, num_neighbors=5, exclude_same_user=False)
    in_the_way.unlink()
    lines = []
    retrieve(RetrieveConfig(store_uri=store, embeddings="e", num_neighbors=5), say=lines.append)
    assert not [line for line in lines if "earlier run" in line]
    check_windows(store, vectors, "every", 5, same_user=False, held_out=False)


def test_too_low_a_recall_is_an_error_that_names_the_knob_and_leaves_no_table(sequences, tmp_path):
    store, _ = made(tmp_path / "store", sequences)
    said = (
        r"the ivf index finds 0\.\d+ of the 2 nearest items of .*: raise num_probes=1 \(num_lists=4"
    )
    with pytest.raises(ConfigError, match=said):
        run(store, index="ivf", num_neighbors=2, num_lists=4, num_probes=1, min_recall=1)
    assert find_table(store, "neighbors", "e") is None


def test_probes_that_nobody_chose_are_doubled_until_the_recall_is_met(sequences, tmp_path):
    store, vectors = made(tmp_path / "store", sequences)
    config = RetrieveConfig(
        store_uri=store, embeddings="e", index="ivf", num_lists=40, num_neighbors=5, min_recall=1
    )
    lines = []
    table = retrieve(config, say=lines.append)
    check_windows(store, vectors, "every", 5, same_user=False, held_out=False)
    probes = table.facts["windows_num_probes"]
    assert probes in (32, 40)
    assert any("num_probes=16, min_recall is 1.0: 32 are tried" in line for line in lines)
    assert table.facts["windows_recall"] == 1
    assert f", {probes} probes, index of " in summary(config, table, 1.0)


def test_a_run_that_has_only_to_write_builds_no_index(sequences, tmp_path):
    store, vectors = made(tmp_path / "store", sequences)
    config = RetrieveConfig(
        store_uri=store, embeddings="e", index="ivf", num_lists=40, num_neighbors=5, min_recall=1
    )
    in_the_way = tmp_path / "store" / "neighbors" / "e" / "pool"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    with pytest.raises(StorageError, match="pool"):
        retrieve(config, say=lambda line: None)
    found = tmp_path / "store" / "neighbors" / "e" / "found"
    next(found.glob("*/items-00000-*.npz")).unlink()
    in_the_way.unlink()
    lines = []
    table = retrieve(config, say=lines.append)
    assert [line.split()[1] for line in lines if line.startswith("build")] == ["items"]
    assert "all windows were searched by an earlier run: no index is built" in lines
    assert table.facts["windows_recall"] == 1
    assert table.facts["windows_num_probes"] > 16
    check_windows(store, vectors, "every", 5, same_user=False, held_out=False)


def test_tasks_and_blocks_do_not_change_a_byte(sequences, tmp_path):
    store, _ = made(tmp_path / "store", sequences)
    few = run(store, name="few", block_mb=64, num_cpus=1)
    many = run(store, name="many", block_mb=1, queries_per_task=7, num_cpus=2)
    assert few.content_hash == many.content_hash
    assert few.num_neighbors == 10


def test_a_table_is_found_again_and_remade_with_other_settings_only_when_told_to(
    sequences, tmp_path
):
    store, vectors = made(tmp_path / "store", sequences)
    first = run(store, num_neighbors=3)
    lines = []
    config = RetrieveConfig(store_uri=store, embeddings="e", num_neighbors=3, block_mb=1)
    assert retrieve(config, say=lines.append) == first
    assert lines == [f"{store} already has neighbors/e: nothing to do"]
    other = config.model_copy(update={"exclude_same_user": False})
    with pytest.raises(ConfigError, match="exclude_same_user=True, not False: --overwrite"):
        retrieve(other)
    retrieve(other, overwrite=True, say=lambda line: None)
    check_windows(store, vectors, "every", 3, same_user=True, held_out=False)


def test_embeddings_that_are_not_of_the_store_are_refused(sequences, tmp_path):
    store, _ = made(tmp_path / "store", sequences)
    table = find_table(store, "embeddings", "e")
    path = tmp_path / "store" / table.window_parts[1].path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"part-00001\.parquet has sha256"):
        run(store)
    assert find_table(store, "neighbors", "e") is None


def test_tasks_larger_than_the_cluster_are_refused(sequences, tmp_path):
    store, _ = made(tmp_path / "store", sequences)
    with pytest.raises(ConfigError, match=r"room for 0 tasks of 3 CPU.*lower cpus_per_task"):
        run(store, cpus_per_task=3)
    assert run(store, cpus_per_task=2, index="ivf", num_lists=2, num_probes=2).facts


def test_without_windows_items_alone_are_listed(sequences, tmp_path):
    make_store(tmp_path / "store", sequences, num_items=NUM_ITEMS)
    store = str(tmp_path / "store")
    make_embeddings(store, vectors_of(NUM_ITEMS, 2), None, which="none")
    table = run(store, num_neighbors=5)
    assert len(items_of(store)) == NUM_ITEMS
    assert table.window_parts == table.pools == ()


def test_the_command_makes_the_table_says_what_it_holds_and_finds_it_again(
    sequences, tmp_path, monkeypatch, capsys
):
    store, vectors = made(tmp_path / "store", sequences)
    given = ["configs/retrieve/beauty.yaml", f"store_uri={store}", "embeddings=e"]
    monkeypatch.setattr("sys.argv", ["retrieve.py", *given, "num_neighbors=5"])
    main()
    expected = check_windows(store, vectors, "every", 5, same_user=False, held_out=False)
    said = capsys.readouterr().out
    zero = sum(not vectors[key].any() for key in expected)
    count = len(expected)
    assert f"{count} (every) among {count}, {zero} without text; exact in" in said
    assert "0.0% of the same user, 0.0% inputs of validation or test" in said
    main()
    again = capsys.readouterr().out
    assert "already has neighbors/e: nothing to do" in again
    assert [line for line in again.splitlines()[1:] if not line.startswith("time")] == [
        line for line in said.splitlines()[-9:] if not line.startswith("time")
    ]
