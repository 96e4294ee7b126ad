import json

import numpy as np
import pytest

from distrl.data.config import DataConfig
from distrl.data.plan import Ledger, not_in, plan
from distrl.errors import CheckpointError
from tests.store_factory import make_store

STORE = "0123456789abcdef"


def ledger_of(*entries):
    ledger = Ledger(STORE)
    for epoch, shard, serials in entries:
        serials = np.array(serials)
        ledger.add(np.full(len(serials), epoch), np.full(len(serials), shard), serials)
    return ledger


def test_serials_in_any_order_become_ranges():
    ledger = ledger_of((0, 1, [5, 3, 4, 9, 0]))
    assert ledger.consumed(0, 1) == [(0, 1), (3, 6), (9, 10)]
    assert ledger.consumed_count(0, 1) == ledger.total == 5


def test_ranges_that_touch_become_one():
    ledger = ledger_of((0, 0, [0, 1]), (0, 0, [4, 5]), (0, 0, [3, 2]))
    assert ledger.consumed(0, 0) == [(0, 6)]


def test_samples_of_several_units_are_told_apart():
    ledger = Ledger(STORE)
    ledger.add(np.array([0, 1, 0, 1]), np.array([2, 2, 3, 2]), np.array([7, 7, 8, 8]))
    assert ledger.units == [(0, 2), (0, 3), (1, 2)]
    assert ledger.consumed(1, 2) == [(7, 9)]
    assert ledger.consumed(0, 0) == []
    assert ledger.consumed_count(5, 5) == 0


def test_adding_nothing_changes_nothing():
    ledger = ledger_of((0, 0, []))
    assert ledger.units == []
    assert ledger.total == 0


def test_a_random_order_of_random_batches_sums_to_everything():
    rng = np.random.default_rng(0)
    places = np.array([(e, s, n) for e in range(3) for s in range(4) for n in range(50 + s)])
    rng.shuffle(places)
    ledger = Ledger(STORE)
    for batch in np.array_split(places, 37):
        ledger.add(*batch.T)
    assert ledger.total == len(places)
    assert all(ledger.consumed(e, s) == [(0, 50 + s)] for e in range(3) for s in range(4))


def test_merging_joins_what_two_workers_consumed():
    ledger = ledger_of((0, 0, [0, 1, 4]), (0, 1, [0]))
    ledger.merge(ledger_of((0, 0, [2, 3]), (1, 0, [6])))
    assert ledger.consumed(0, 0) == [(0, 5)]
    assert ledger.consumed(0, 1) == [(0, 1)]
    assert ledger.consumed(1, 0) == [(6, 7)]


def test_a_sample_twice_is_an_error_and_changes_nothing():
    ledger = ledger_of((2, 3, [10, 11, 12]))
    with pytest.raises(ValueError, match="epoch 2, shard 3: samples 11 to 11 are in the ledger"):
        ledger.merge(ledger_of((0, 0, [1]), (2, 3, [11])))
    with pytest.raises(ValueError, match="twice"):
        ledger_of((0, 0, [5, 5]))
    assert ledger.units == [(2, 3)]
    assert ledger.consumed(2, 3) == [(10, 13)]


def test_a_ledger_survives_json():
    ledger = ledger_of((0, 0, range(10)), (0, 1, range(9)), (1, 0, [0, 1, 5]))
    back = Ledger.from_json(ledger.to_json(), STORE)
    assert back.units == ledger.units
    assert all(back.consumed(*unit) == ledger.consumed(*unit) for unit in ledger.units)
    assert Ledger.from_json(Ledger(STORE).to_json(), STORE).total == 0


def test_finished_epochs_take_no_room():
    done = [(epoch, shard, range(100)) for epoch in range(50) for shard in range(3)]
    few, many = ledger_of(*done[:6]), ledger_of(*done)
    assert len(many.to_json()) - len(few.to_json()) <= 2
    assert Ledger.from_json(many.to_json(), STORE).total == 50 * 300


def test_a_ledger_of_another_store_is_refused():
    with pytest.raises(CheckpointError, match="manifest 0123456789ab, the store is now ffff"):
        Ledger.from_json(Ledger(STORE).to_json(), "ffff")


@pytest.mark.parametrize(
    "ranges", ["[[3, 1]]", "[[0, 5], [5, 6]]", "[[0, 5], [2, 9]]", "[[0]]", '[["0", "5"]]', "7"]
)
def test_a_torn_ledger_is_refused(ranges):
    text = ledger_of((0, 0, range(5))).to_json().replace("[[0, 5]]", ranges)
    with pytest.raises(CheckpointError, match="torn"):
        Ledger.from_json(text, STORE)
    with pytest.raises(CheckpointError, match="torn"):
        Ledger.from_json(text[:-5], STORE)


def test_serials_outside_of_ranges():
    serials = np.array([0, 1, 2, 5, 6, 9])
    assert not_in(serials, [(1, 3), (6, 9)]).tolist() == [True, False, False, True, False, True]
    assert not_in(serials, []).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shards of 4, 4 and 3 users; with 3, 3 and 2 trainable ones of 3 targets each."""
    folder = tmp_path_factory.mktemp("plan") / "store"
    sequences = [[1, 2, 3, 4, 5, 6]] * 8 + [[1, 2, 3]] * 3
    return make_store(folder, sequences, num_shards=3), DataConfig(store_uri=str(folder))


def places(works):
    return [(work.epoch, work.shard) for work in works]


def test_a_plan_reads_every_shard_of_every_epoch_in_an_order_that_the_seed_fixes(store):
    manifest, config = store
    works = plan(manifest, config, seed=0, epochs=40, ledger=Ledger(STORE))
    assert [epoch for epoch, _ in places(works)] == sorted(list(range(40)) * 3)
    orders = [tuple(s for e, s in places(works) if e == epoch) for epoch in range(40)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) == 6
    again = plan(manifest, config, seed=0, epochs=40, ledger=Ledger(STORE))
    other = plan(manifest, config, seed=1, epochs=40, ledger=Ledger(STORE))
    assert again == works
    assert places(other) != places(works)


def test_only_the_first_reading_of_a_shard_is_marked_so(store):
    manifest, config = store
    works = plan(manifest, config, seed=0, epochs=3, ledger=ledger_of((0, 1, range(3))))
    assert sorted(work.shard for work in works if work.first) == [0, 1, 2]
    assert [work.epoch for work in works if work.first and work.shard == 1] == [1]


def test_a_plan_leaves_out_finished_units_and_says_what_is_done_of_others(store):
    manifest, config = store
    fresh = plan(manifest, config, seed=0, epochs=2, ledger=Ledger(STORE))
    ledger = ledger_of((0, 0, range(3)), (0, 2, range(2)), (1, 1, [2, 0]))
    works = plan(manifest, config, seed=0, epochs=2, ledger=ledger)
    assert places(works) == [p for p in places(fresh) if p not in [(0, 0), (0, 2)]]
    assert {(w.epoch, w.shard): w.done for w in works}[1, 1] == [(0, 1), (2, 3)]
    left = plan(manifest, config, seed=0, epochs=1, ledger=ledger_of((0, 1, range(3))))
    assert places(left) == [p for p in places(fresh)[:3] if p != (0, 1)]


def test_prefixes_are_counted_as_samples(store):
    manifest, config = store
    prefix = config.model_copy(update={"samples": "prefix"})
    ledger = ledger_of((0, 0, range(9)), (0, 1, range(8)), (0, 2, range(6)))
    assert places(plan(manifest, prefix, seed=0, epochs=1, ledger=ledger)) == [(0, 1)]


@pytest.mark.parametrize(("shard", "size"), [(1, 3), (7, 0)])
def test_a_ledger_of_samples_that_the_store_has_not_is_refused(store, shard, size):
    manifest, config = store
    with pytest.raises(CheckpointError, match=f"sample 5 of epoch 0, shard {shard}.* has {size}"):
        plan(manifest, config, seed=0, epochs=1, ledger=ledger_of((0, shard, [5])))


def test_a_shard_without_targets_is_not_read(tmp_path):
    manifest = make_store(tmp_path / "store", [[1, 2, 3, 4], [1, 2, 3]], num_shards=2)
    config = DataConfig(store_uri=str(tmp_path / "store"))
    assert places(plan(manifest, config, seed=0, epochs=1, ledger=Ledger(STORE))) == [(0, 0)]


def test_the_ledger_is_json_that_others_can_read():
    content = json.loads(ledger_of((0, 4, [0, 1])).to_json())
    assert content == {
        "store_manifest": STORE,
        "epochs": [{"first": 0, "last": 0, "shards": {"4": [[0, 2]]}}],
    }
