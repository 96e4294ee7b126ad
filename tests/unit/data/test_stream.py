"""The stream without Ray: the same samples, plan and thread in one process."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.stream import _ours, local_batches
from distrl.errors import SchemaError, StorageError
from tests.store_factory import make_store

STORE = "hash"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 200, n).tolist() for n in rng.integers(3, 30, 300)]
    folder = tmp_path_factory.mktemp("stream") / "store"
    return folder, make_store(folder, sequences, num_shards=3, row_group_rows=40)


def stream(store, ledger=None, epochs=2, **settings):
    folder, manifest = store
    config = DataConfig(store_uri=str(folder), **{"batch_size": 32, **settings})
    maker = BatchMaker(config, 2, manifest.num_items, 0)
    return local_batches(manifest, config, maker, epochs=epochs, ledger=ledger or Ledger(STORE))


def consume(batches, ledger, at_most=None):
    """Items of the first view of each sample, by place, up to a number of batches."""
    seen = {}
    for number, (batch, taken) in enumerate(batches):
        if number == at_most:
            break
        ledger.add(taken.epoch, taken.shard, taken.serial)
        places = zip(taken.epoch.tolist(), taken.shard.tolist(), taken.serial.tolist(), strict=True)
        segment = batch.views[0].segment.flatten()
        items = batch.views[0].items.flatten()
        for row, place in enumerate(places):
            seen[place] = items[segment == row].tolist()
    return seen


def test_every_sample_of_every_epoch_is_served_once(store):
    ledger = Ledger(STORE)
    consume(stream(store), ledger)
    assert ledger.total == 2 * store[1].num_trainable_rows
    for epoch in range(2):
        for number, shard in enumerate(store[1].sequences):
            assert ledger.consumed(epoch, number) == [(0, shard.trainable_rows)]


def test_batches_are_full_but_for_the_last(store):
    sizes = [len(taken.serial) for _, taken in stream(store)]
    total = 2 * store[1].num_trainable_rows
    assert sum(sizes) == total
    assert set(sizes[:-1]) == {32}
    assert 0 < sizes[-1] <= 32


@pytest.mark.parametrize("mode", ["all_positions", "prefix"])
def test_what_a_restart_serves_is_what_was_left_with_the_same_views(store, mode):
    whole = consume(stream(store, samples=mode, epochs=1), Ledger(STORE))
    ledger = Ledger(STORE)
    first = consume(stream(store, samples=mode, epochs=1), ledger, at_most=4)
    back = Ledger.from_json(ledger.to_json(), STORE)
    rest = stream(store, ledger=back, samples=mode, epochs=1, batch_size=50)
    second = consume(rest, ledger)
    assert not set(first) & set(second)
    assert first | second == whole


def test_nothing_is_left_to_serve_when_all_is_done(store):
    ledger = Ledger(STORE)
    consume(stream(store), ledger)
    assert list(stream(store, ledger=ledger)) == []


def test_an_ended_stream_stays_ended(store):
    batches = stream(store, epochs=1, batch_size=1000)
    next(batches)
    assert next(batches, None) is None
    assert next(batches, None) is None


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_wanted(tmp_path):
    folder = tmp_path / "store"
    manifest = make_store(folder, [[1, 2, 3, 4, 5]] * 20, num_shards=1)
    (folder / manifest.sequences[0].path).write_bytes(b"")
    batches = stream((folder, manifest))
    with pytest.raises(SchemaError, match="part-00000"):
        next(batches)
    assert next(batches, None) is None


def test_what_ray_adds_to_a_users_mistake_is_left_out():
    mistake = StorageError("cannot read x: it does not exist\nFailed to apply UDF transform after")
    wrapped = ValueError("of Ray")
    wrapped.__cause__ = mistake
    found = _ours(wrapped)
    assert (type(found), str(found)) == (StorageError, "cannot read x: it does not exist")
    assert _ours(found) is found
    other = ValueError("no mistake of the user's")
    assert _ours(other) is other


def making_batches():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def until_it_ends(thread):
    thread.join(timeout=30)
    assert not thread.is_alive(), "the thread goes on"


def test_the_thread_ends_when_the_stream_is_closed_or_forgotten(store):
    before = making_batches()
    closed = stream(store, epochs=50)
    next(closed)
    (thread,) = [thread for thread in making_batches() if thread not in before]
    closed.close()
    until_it_ends(thread)
    forgotten = stream(store, epochs=50)
    next(forgotten)
    (thread,) = [thread for thread in making_batches() if thread not in before]
    del forgotten
    gc.collect()
    until_it_ends(thread)


def test_waiting_is_counted_apart_from_the_start(store):
    batches = stream(store, epochs=1)
    next(batches)
    assert batches.start_s > 0
    assert batches.waited_s == 0
    list(batches)
    assert batches.waited_s > 0


def test_reading_tasks_start_without_torch():
    code = "import sys, distrl.data.units; assert not {'torch', 'ray'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_beauty_has_the_papers_number_of_samples_and_targets(beauty_file, tmp_path):
    lines = beauty_file.read_text().splitlines()
    folder = tmp_path / "store"
    sequences = [[int(item) for item in line.split()[1:]] for line in lines]
    manifest = make_store(folder, sequences, num_shards=4, row_group_rows=4096)
    assert manifest.num_trainable_rows == 22_363
    for mode, samples in (("all_positions", 22_363), ("prefix", 131_413)):
        config = DataConfig(store_uri=str(folder), samples=mode)
        maker = BatchMaker(config, 0, manifest.num_items, 0)
        ledger, targets = Ledger(STORE), 0
        for batch, taken in local_batches(manifest, config, maker, epochs=1, ledger=Ledger(STORE)):
            ledger.add(taken.epoch, taken.shard, taken.serial)
            targets += batch.num_targets
        assert (ledger.total, targets) == (samples, 131_413)
