"""Raw logs to stores on a real local Ray, on disk and on a real S3 server."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from distrl import storage
from distrl.data.prepare import prepare
from distrl.data.prepare_config import PrepareConfig
from distrl.data.store import read_item_ids, read_manifest, verify_store
from distrl.errors import ConfigError, SchemaError, StorageError
from tests.integration.s3_server import start_s3

REPOSITORY = Path(__file__).parents[2]
ML_100K = REPOSITORY.parent / "shared/data/ml-100k"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with start_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(s3):
    """A Ray of this module's own, whose workers inherit the server's credentials."""
    before = dict(os.environ)
    os.environ.update(s3.environment())
    # Short, because the paths of Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="prep-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """20,000 events with ties in time, repeats, and rare users and items, in three files."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("events")
    rows = 20_000
    table = pa.table(
        {
            "user": [f"u{number}" for number in rng.zipf(1.3, rows) % 1500],
            "item": rng.zipf(1.2, rows) % 700,
            "timestamp": rng.integers(1_600_000_000, 1_600_002_000, rows),
            "rating": rng.integers(1, 6, rows),
        }
    )
    for number, start in enumerate((0, 7_000, 9_000)):
        end = (7_000, 9_000, rows)[number]
        path = folder / f"events-{number}.parquet"
        pq.write_table(table.slice(start, end - start), path, row_group_size=1000)
    return folder


def config(store, source, **settings):
    """A small prepare; `source` is a URI or a section."""
    section = source if isinstance(source, dict) else {"uri": str(source)}
    return PrepareConfig.model_validate(
        {"store_uri": str(store), "source": section, "num_shards": 4, **settings}
    )


def histories(store_uri, manifest):
    """Each user's own items in order, and the order of users in each shard."""
    ids = read_item_ids(store_uri, manifest).to_pylist()
    users, shards = {}, []
    for shard in manifest.sequences:
        with storage.open_input(storage.join(store_uri, shard.path)) as file:
            rows = pq.read_table(file).to_pylist()
        shards.append([row["user"] for row in rows])
        users |= {row["user"]: [ids[item - 1] for item in row["items"]] for row in rows}
    return users, shards


def by_hand(table, *, keep="none", most=None, least=1):
    """The same, in plain Python: slow, and too plain to be wrong."""
    users = {}
    for row in sorted(table.to_pylist(), key=lambda row: row["timestamp"]):
        users.setdefault(row["user"], []).append(row["item"])
    if keep == "first":
        users = {user: list(dict.fromkeys(items)) for user, items in users.items()}
    if most is not None:
        users = {user: items[-most:] for user, items in users.items()}
    while True:
        counts = {}
        for item in (item for items in users.values() for item in items):
            counts[item] = counts.get(item, 0) + 1
        kept = {user: [i for i in items if counts[i] >= least] for user, items in users.items()}
        kept = {user: items for user, items in kept.items() if len(items) >= least}
        if kept == users:
            order = sorted(counts, key=lambda item: (-counts[item], item))
            return users, order
        users = kept


def test_a_store_is_what_plain_python_makes_of_the_events(cluster, events, tmp_path):
    core = {"min_user_interactions": 5, "min_item_interactions": 5}
    made = config(tmp_path / "store", events, deduplicate="first", k_core=core, num_partitions=3)
    lines = []
    manifest = prepare(made, say=lines.append)
    users, order = by_hand(pq.read_table(events), keep="first", least=5)
    found, shards = histories(made.store_uri, manifest)
    assert found == users
    assert read_item_ids(made.store_uri, manifest).to_pylist() == order
    lengths = [len(items) for items in users.values()]
    assert manifest.num_interactions == sum(lengths)
    assert (manifest.num_users, manifest.num_items) == (len(users), len(order))
    assert manifest.num_prefixes == sum(max(length - 3, 0) for length in lengths)
    assert manifest.num_trainable_rows == sum(length >= 4 for length in lengths)
    assert (manifest.user_type, manifest.item_type) == ("string", "int64")
    assert len(shards) == 4
    assert max(map(len, shards)) < 2 * min(map(len, shards))
    assert all(shard != sorted(shard) for shard in shards), "users are shuffled within a shard"
    verify_store(made.store_uri, manifest)
    assert any("k-core round 2" in line for line in lines)


def test_of_each_user_the_newest_stay_and_a_very_long_history_is_told_of(
    cluster, events, tmp_path, monkeypatch
):
    core = {"min_user_interactions": 3, "min_item_interactions": 3}
    table = pq.read_table(events)
    longest = max(len(items) for items in by_hand(table, least=3)[0].values())
    monkeypatch.setattr("distrl.data.prepare._LONG_HISTORY", longest)
    for most, told in ((None, f"{longest:,} interactions, which one"), (20, "20 interactions")):
        made = config(tmp_path / str(most), events, k_core=core, max_user_interactions=most)
        lines = []
        manifest = prepare(made, say=lines.append)
        users, order = by_hand(table, most=most, least=3)
        found, _ = histories(made.store_uri, manifest)
        assert found == users
        assert read_item_ids(made.store_uri, manifest).to_pylist() == order
        [line] = [line for line in lines if line.startswith("longest history: ")]
        assert line.startswith(f"longest history: {told}")
        assert ("max_user_interactions" in line) == (most is None)


def test_the_store_does_not_depend_on_how_the_work_is_cut(cluster, events, tmp_path):
    core = {"min_user_interactions": 3, "min_item_interactions": 3, "rounds": 2}
    shards = []
    for name, how in (
        ("one", {"num_partitions": 1, "num_cpus": 1}),
        ("many", {"num_partitions": 37, "num_cpus": 3, "chunk_mb": 1, "partition_mb": 1}),
    ):
        made = config(tmp_path / name, events, k_core=core, items_per_part=100, **how)
        manifest = prepare(made)
        shards.append((manifest.sequences, manifest.items))
        assert len(manifest.items) > 2
    # Paths, counts and checksums of every file.
    assert shards[0] == shards[1]


def test_times_and_ratings_filter_and_times_are_kept(cluster, events, tmp_path):
    source = {"uri": str(events / "*.parquet"), "rating": "rating"}
    filters = {"min_rating": 3, "time_from": 1_600_000_500, "time_to": 1_600_001_000}
    made = config(tmp_path / "store", source, filters=filters)
    manifest = prepare(made)
    table = pq.read_table(events)
    rating, time_s = table["rating"].to_numpy(), table["timestamp"].to_numpy()
    passes = (rating >= 3) & (time_s >= 1_600_000_500) & (time_s < 1_600_001_000)
    assert histories(made.store_uri, manifest)[0] == by_hand(table.filter(pa.array(passes)))[0]
    times = pq.read_table(tmp_path / "store/sequences")["timestamps"].to_pylist()
    assert all(of_user == sorted(of_user) for of_user in times)
    assert sorted(t for of_user in times for t in of_user) == sorted(time_s[passes] * 1000)


def test_noise_goes_in_front_of_held_out_items_and_none_changes_no_byte(cluster, events, tmp_path):
    plain = config(tmp_path / "plain", events, num_partitions=2)
    none = config(tmp_path / "none", events, num_partitions=2, noise_share=0, noise_seed=5)
    noisy = config(tmp_path / "noisy", events, num_partitions=2, noise_share=0.2)
    manifests = [prepare(made) for made in (plain, none, noisy)]
    before, after = (
        histories(made.store_uri, manifest)[0]
        for made, manifest in zip((plain, noisy), manifests[::2], strict=True)
    )
    assert (manifests[0].sequences, manifests[0].items) == (
        (manifests[1].sequences, manifests[1].items)
    )
    assert manifests[0].items == manifests[2].items
    assert manifests[2].num_interactions == sum(map(len, after.values()))
    assert before.keys() == after.keys()
    foreign, own = 0, 0
    for user, items in before.items():
        assert after[user][-2:] == items[-2:]
        head, noisy_head = items[:-2], after[user][:-2]
        assert [item for item in noisy_head if item in set(head)] == head
        planted = len(noisy_head) - len(head)
        assert planted - len(head) // 5 in (0, 1)
        foreign, own = foreign + planted, own + len(head)
    # Each user's part is rounded at random, with a deviation of half an item at most.
    assert foreign == pytest.approx(0.2 * own, abs=5 * 0.5 * len(before) ** 0.5)


def test_beauty_has_the_published_counts(cluster, beauty_file, tmp_path):
    core = {"min_user_interactions": 5, "min_item_interactions": 5}
    source = {"uri": str(beauty_file), "format": "sequences"}
    made = config(tmp_path / "store", source, k_core=core, num_shards=8)
    manifest = prepare(made)
    assert (manifest.num_users, manifest.num_items) == (22_363, 12_101)
    assert (manifest.num_interactions, manifest.num_prefixes) == (198_502, 131_413)
    assert not manifest.has_timestamps
    written = [[int(word) for word in line.split()] for line in beauty_file.open()]
    assert histories(made.store_uri, manifest)[0] == {user: items for user, *items in written}


def test_movielens_100k_has_the_published_counts(cluster, tmp_path):
    log = ML_100K / "interactions.tsv"
    assert log.exists(), f"{log} is missing: MovieLens 100K as `user item timestamp rating`"
    made = config(tmp_path / "store", log)
    manifest = prepare(made)
    counts = (manifest.num_users, manifest.num_items, manifest.num_interactions)
    assert counts == (943, 1682, 100_000)
    written = [[int(word) for word in line.split()] for line in (ML_100K / "sequences.txt").open()]
    assert histories(made.store_uri, manifest)[0] == {user: items for user, *items in written}


def test_the_same_command_again_reuses_the_store(cluster, events, tmp_path):
    made = config(tmp_path / "store", events)
    first = prepare(made)
    lines, connected = [], []
    again = prepare(
        made.model_copy(update={"num_partitions": 5}),
        say=lines.append,
        connect=lambda: connected.append(1),
    )
    assert again == first
    assert lines == [f"{made.store_uri} is already prepared from the same inputs: nothing to do"]
    assert not connected


def test_another_config_or_input_is_refused_by_name_and_overwritten_on_demand(
    cluster, events, tmp_path
):
    copies = tmp_path / "events"
    copies.mkdir()
    for path in events.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    made = config(tmp_path / "store", copies)
    first = prepare(made)
    other = made.model_copy(update={"seed": 3, "num_shards": 2})
    with pytest.raises(ConfigError, match=r"num_shards was 4, is 2; seed was 0, is 3\): .*--over"):
        prepare(other)
    second = prepare(other, overwrite=True)
    assert len(list((tmp_path / "store/sequences").iterdir())) == len(second.sequences) == 2
    assert second.num_interactions == first.num_interactions
    assert histories(other.store_uri, second)[0].keys() == _users(copies)
    (copies / "events-2.parquet").unlink()
    with pytest.raises(ConfigError, match=r"input .*events-2\.parquet is gone"):
        prepare(other)


def _users(folder):
    return set(pq.read_table(folder)["user"].to_pylist())


def test_a_store_with_a_torn_shard_is_not_reused(cluster, events, tmp_path):
    made = config(tmp_path / "store", events)
    shard = prepare(made).sequences[1]
    path = tmp_path / "store" / shard.path
    path.write_bytes(path.read_bytes()[:-1])
    said = rf"shard {shard.path} has bytes {shard.bytes - 1}, the manifest says {shard.bytes}"
    with pytest.raises(SchemaError, match=said):
        prepare(made)
    prepare(made, overwrite=True)
    verify_store(made.store_uri, read_manifest(made.store_uri))


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (None, {}, r"events\.csv does not exist"),
        ("user,item\n1,2\n", {}, r"events\.csv has no column 'timestamp'"),
        (
            "user,item,timestamp\n1,2,3\n,5,4\n7,,8\n,9,1\n",
            {},
            r"without a value: user in 2 rows, item in 1 rows; the first is .*events\.csv row 2 "
            r"\(user=None, item=5, timestamp=4000\)",
        ),
        ("user,item,timestamp\n1,2,\n", {}, "timestamp in 1 rows"),
        ("user,item,timestamp\n1,2,3\n1,2\n", {}, r"events\.csv line 3: 2 fields, 3 expected"),
        (
            "user,item,timestamp\n1,2,3\n1,3,4\n",
            {"filters": {"time_from": 10}},
            r"no interaction is left .*rows read: 2, .*after filters\.time_from and time_to: 0",
        ),
        (
            "user,item,timestamp\n1,2,3\n1,3,4\n",
            {"k_core": {"min_item_interactions": 2}},
            r"no interaction is left .*after deduplicate=none: 2, after k_core round 1: 0",
        ),
    ],
    ids=["file", "column", "null-ids", "null-times", "unparsable", "filters", "k-core"],
)
def test_bad_input_is_one_error_and_leaves_no_store(cluster, tmp_path, content, settings, said):
    source = tmp_path / "events.csv"
    if content is not None:
        source.write_text(content)
    made = config(tmp_path / "store", source, **settings)
    with pytest.raises((SchemaError, StorageError), match=said) as caught:
        prepare(made)
    assert "\n" not in str(caught.value), "one line, without Ray's stack traces"
    with pytest.raises(StorageError, match="has no manifest"):
        read_manifest(made.store_uri)


def test_bad_input_leaves_an_older_store_alone_even_when_overwriting(cluster, events, tmp_path):
    made = config(tmp_path / "store", events)
    manifest = prepare(made)
    bad = tmp_path / "bad.csv"
    bad.write_text("user,item,timestamp\n1,,3\n")
    with pytest.raises(SchemaError, match="without a value"):
        prepare(config(tmp_path / "store", bad), overwrite=True)
    verify_store(made.store_uri, manifest)
    assert read_manifest(made.store_uri) == manifest


def test_from_s3_to_s3_is_the_same_as_on_disk(cluster, s3, events, tmp_path):
    bucket = s3.create_bucket("prepare")
    for path in events.iterdir():
        storage.write_bytes(f"{bucket}/raw/{path.name}", path.read_bytes())
    on_disk = prepare(config(tmp_path / "store", events))
    made = config(f"{bucket}/stores/events", f"{bucket}/raw/*.parquet")
    manifest = prepare(made)
    assert (manifest.sequences, manifest.items) == (on_disk.sequences, on_disk.items)
    verify_store(made.store_uri, read_manifest(made.store_uri))
    lines = []
    assert prepare(made, say=lines.append) == manifest
    assert "nothing to do" in lines[0]
    assert s3.secret_key not in manifest.model_dump_json()


def test_a_source_may_be_anything_that_fsspec_opens(cluster, tmp_path):
    (tmp_path / "events.csv").write_text("user,item,timestamp\n1,b,2\n1,a,1\n2,a,1\n")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        made = config(tmp_path / "store", f"http://127.0.0.1:{server.server_port}/events.csv")
        manifest = prepare(made)
        server.shutdown()
    assert histories(made.store_uri, manifest)[0] == {1: ["a", "b"], 2: ["a"]}


def test_a_wrong_secret_is_one_error_before_ray_is_needed(s3, events, monkeypatch, tmp_path):
    bucket = s3.create_bucket("secret")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for made in (
        config(tmp_path / "store", f"{bucket}/raw/*.parquet"),
        config(f"{bucket}/store", events),
    ):
        with pytest.raises(StorageError, match=f"{bucket}.*permission denied; check the cred"):
            prepare(made, connect=lambda: pytest.fail("Ray is not needed to see this"))


def test_a_store_that_may_not_be_written_is_one_error(s3, events, monkeypatch):
    bucket = s3.create_bucket("readonly")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret_key)
    with pytest.raises(StorageError, match=f"cannot write {bucket}/store.*permission denied"):
        prepare(
            config(f"{bucket}/store", events),
            connect=lambda: pytest.fail("Ray is not needed to see this"),
        )


@pytest.fixture
def job():
    """Runs jobs/prepare.py as a user does, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    folder = tempfile.mkdtemp(prefix="prep-", dir="/tmp")
    environment["RAY_TMPDIR"] = folder

    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "jobs/prepare.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_job_prints_what_it_made_and_mistakes_on_one_line(job, tmp_path, beauty_file):
    beauty = ["configs/prepare/beauty.yaml", f"store_uri={tmp_path}/s", f"source.uri={beauty_file}"]
    output, errors = (process := job(*beauty)).communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "interactions      198,502" in output
    assert "training targets  131,413 in 22,363 users" in output
    for arguments, said in (
        ([*beauty, "num_shards=3"], "num_shards was 8, is 3"),
        ([*beauty, "numshards=3"], "numshards: unknown key (did you mean num_shards?)"),
    ):
        output, errors = (process := job(*arguments)).communicate(timeout=180)
        assert process.returncode == 2
        assert errors.startswith("error: ")
        assert said in errors
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_killed_prepare_leaves_no_manifest_and_its_rerun_a_whole_store(job, tmp_path, events):
    store = tmp_path / "store"
    settings = [f"store_uri={store}", f"source.uri={events}", "num_shards=2000"]
    process = job("configs/prepare/beauty.yaml", *settings, "source.format=parquet")
    try:
        deadline = time.monotonic() + 120
        while len(list(store.glob("sequences/part-*"))) < 20:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with pytest.raises(StorageError, match="or its prepare did not finish"):
        read_manifest(str(store))
    (store / "sequences/part-99999.parquet").write_bytes(b"of an earlier prepare")
    process = job(
        "configs/prepare/beauty.yaml", *settings[:2], "num_shards=4", "source.format=parquet"
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    manifest = read_manifest(str(store))
    verify_store(str(store), manifest)
    assert len(list(store.glob("sequences/*"))) == len(manifest.sequences) == 4
