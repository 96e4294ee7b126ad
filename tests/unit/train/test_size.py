"""What a run says of its size before it trains."""

import pytest

from distrl.config import RunConfig
from distrl.train.size import parameters_of_parts, size_lines

ITEMS, HIDDEN, LENGTH = 100, 8, 10
GIGABYTE = 1e9


def run_of(workers=1, precision="fp32", method="sasrec"):
    asked = {"name": method, "hidden_size": HIDDEN, "inner_size": 32, "num_layers": 1}
    return RunConfig.model_validate(
        {
            "name": "a",
            "method": asked,
            "data": {"store_uri": "s", "max_len": LENGTH, "batch_size": 12},
            "engine": {"precision": precision},
            "workers": {"num_workers": workers},
        }
    )


def test_parameters_are_counted_by_hand():
    # PAD, the items and a mask token; positions; a block of two norms, four projections and a
    # feed-forward of 32, all with biases; and a norm in front of it.
    [(part, count)] = parameters_of_parts(run_of(), ITEMS).items()
    projections = 4 * (HIDDEN * HIDDEN + HIDDEN)
    feed_forward = 2 * HIDDEN * 32 + 32 + HIDDEN
    by_hand = (ITEMS + 2 + LENGTH) * HIDDEN + projections + feed_forward + 3 * 2 * HIDDEN
    assert (part, count) == ("encoder", by_hand)


def test_parts_are_told_apart():
    parts = parameters_of_parts(run_of(method="mclrec"), ITEMS)
    assert list(parts) == ["encoder", "augmenters"]
    assert parts["encoder"] == parameters_of_parts(run_of(), ITEMS)["encoder"]
    assert parts["augmenters"] > 0


@pytest.mark.parametrize(("precision", "amount"), [("fp32", "2.0 GB"), ("bf16", "2.3 GB")])
def test_a_large_catalog_is_told_in_memory_before_it_is_met(precision, amount):
    nodes = [{"CPU": 4.0, "memory": 3 * GIGABYTE}]
    [line] = size_lines(run_of(precision=precision), 8_000_000, {"CPU": 1.0}, nodes)
    assert line == f"parameters: encoder 64.0 M; up to {amount} of memory on each worker"


def test_a_small_model_is_told_in_full():
    [line] = size_lines(run_of(), ITEMS, {"CPU": 1.0}, [{"CPU": 4.0, "memory": GIGABYTE}])
    assert line == "parameters: encoder 1,784; up to 1 MB of memory on each worker"


def test_a_cluster_that_has_yet_to_grow_is_not_taken_for_one_without_memory():
    nodes = [{"CPU": 1.0, "memory": 10 * GIGABYTE}]
    lines = size_lines(run_of(4), 8_000_000, {"CPU": 1.0, "special": 1.0}, nodes)
    assert len(lines) == 1
    assert len(size_lines(run_of(4), 80_000_000, {"CPU": 1.0}, nodes)) == 2


@pytest.mark.parametrize(
    ("workers", "gigabytes", "warned"), [(2, 5, False), (3, 5, True), (1, 2, True), (4, 9, False)]
)
def test_workers_that_the_nodes_have_no_memory_for_are_warned_of(workers, gigabytes, warned):
    nodes = [{"CPU": 8.0, "memory": gigabytes * GIGABYTE}, {"CPU": 8.0}]
    lines = size_lines(run_of(workers), 8_000_000, {"CPU": 1.0}, nodes)
    assert len(lines) == 1 + warned
    if warned:
        room = int(gigabytes / 2.05)
        assert lines[1].startswith(f"warning: nodes have memory for {room} such workers, this run")
        assert f"the largest node has {gigabytes}.0 GB" in lines[1]
