"""Process groups, each check in a process of its own.

A group that is destroyed leaves DeepSpeed with one that no longer exists: the tests' own process
would be of no use to any test behind these.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch.distributed as dist

from distrl.engine.collectives import (
    LAUNCHER_KEYS,
    broadcast_object,
    ensure_process_group,
    gather_objects,
    host_group,
    rank,
    sum_over_ranks,
    world_size,
)


@pytest.fixture
def elsewhere(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """Runs a check in a new process that nobody has launched as a worker."""
    for key in (*LAUNCHER_KEYS, "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)

    def run(check: Callable[[], None]) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(check).result()

    return run


def a_group_of_one() -> None:
    ensure_process_group("gloo")
    assert (rank(), world_size(), dist.get_backend()) == (0, 1, "gloo")
    assert sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert gather_objects("alone") == ["alone"]
    assert broadcast_object({"a": 1}) == {"a": 1}


def the_group_stays() -> None:
    ensure_process_group("gloo")
    world = dist.group.WORLD
    ensure_process_group("gloo")
    assert dist.group.WORLD is world


def the_host_group_follows() -> None:
    ensure_process_group("gloo")
    first = host_group()
    assert first is dist.group.WORLD
    dist.destroy_process_group()
    ensure_process_group("gloo")
    assert host_group() is dist.group.WORLD
    assert host_group() is not first


def test_a_plain_process_is_a_group_of_one(elsewhere):
    elsewhere(a_group_of_one)


def test_a_group_that_exists_already_stays(elsewhere):
    elsewhere(the_group_stays)


def test_the_host_group_is_that_of_the_current_process_group(elsewhere):
    elsewhere(the_host_group_follows)


def wrong() -> None:
    ensure_process_group("gloo")
    assert world_size() == 2


def test_a_check_elsewhere_can_fail(elsewhere):
    with pytest.raises(AssertionError):
        elsewhere(wrong)
