import pytest
import torch

from benchmarks.data_path import after_the_start
from benchmarks.step_cases import batches, padded
from benchmarks.store import generate
from benchmarks.timing import interleaved
from distrl.contract import Catalog
from distrl.data.store import read_item_ids, verify_store
from distrl.methods.mclrec import MCLRecConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return str(folder), generate(str(folder), num_users=300, num_items=40)


def test_the_generated_store_is_whole_and_of_beautys_lengths(store):
    uri, manifest = store
    verify_store(uri, manifest)
    assert manifest.num_trainable_rows == manifest.num_users == 300
    assert len(read_item_ids(uri, manifest)) == 40
    assert 8 < manifest.num_interactions / manifest.num_users < 10


def test_padded_prefixes_have_the_loss_of_packed_ones(store):
    uri, manifest = store
    (packed,) = batches(manifest, uri, "prefix", 2, 1)
    alone = padded(packed, 50)
    assert alone.clean.items.shape == alone.views[0].items.shape == (256, 50)
    torch.manual_seed(0)
    config = MCLRecConfig(hidden_size=8, inner_size=8)
    method = config.build(Catalog(manifest.num_items, 50)).eval()
    (phase, *_) = method.phases(0)
    shares = {"target": 1.0, "pair": 1.0}
    expected = method(packed, phase).total(shares).item()
    assert method(alone, phase).total(shares).item() == pytest.approx(expected, rel=1e-5)


def test_alternatives_run_in_turns_after_one_run_to_warm_up():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, runs=2)
    assert calls == ["a", "b"] * 3
    assert times["a"].runs == 2
    assert times["a"].least_s <= times["a"].median_s <= times["a"].most_s


def test_rates_and_waits_after_the_start_are_weighed_by_time():
    # From step 50 on: 10 steps of 4 targets at 20/s take 2 s, 10 more at 10/s take 4 s.
    rates = [(40, 1.0), (50, 1.0), (60, 20.0), (70, 10.0)]
    waits = [(40, 1.0), (50, 1.0), (60, 0.5), (70, 0.25)]
    found = after_the_start(rates, waits, 4.0)
    assert found["targets_per_s"] == pytest.approx(80 / 6)
    assert found["wait_share"] == pytest.approx((2 * 0.5 + 4 * 0.25) / 6)
