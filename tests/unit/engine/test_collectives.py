import os

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
def unlaunched(monkeypatch):
    for key in (*LAUNCHER_KEYS, "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.pop("LOCAL_RANK", None)


def test_a_plain_process_is_a_group_of_one(unlaunched):
    ensure_process_group("gloo")
    assert (rank(), world_size(), dist.get_backend()) == (0, 1, "gloo")
    assert sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert gather_objects("alone") == ["alone"]
    assert broadcast_object({"a": 1}) == {"a": 1}


def test_a_group_that_exists_already_stays(unlaunched):
    ensure_process_group("gloo")
    world = dist.group.WORLD
    ensure_process_group("gloo")
    assert dist.group.WORLD is world


def test_the_host_group_is_that_of_the_current_process_group(unlaunched):
    ensure_process_group("gloo")
    first = host_group()
    assert first is dist.group.WORLD
    dist.destroy_process_group()
    ensure_process_group("gloo")
    assert host_group() is dist.group.WORLD
    assert host_group() is not first
