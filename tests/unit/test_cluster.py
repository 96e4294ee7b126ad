import pytest

from distrl.cluster import Need, check_capacity, check_room, room_for
from distrl.errors import ConfigError

NODES = [{"CPU": 16.0, "GPU": 1.0, "memory": 1e9}, {"CPU": 16.0}, {"CPU": 3.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("each", "room"),
    [
        ({"CPU": 16.0}, 2),
        ({"CPU": 6.0}, 2 + 2),
        ({"CPU": 32.0}, 0),
        ({"CPU": 1.0, "GPU": 0.0}, 16 + 16 + 3),
        ({"CPU": 1.0, "GPU": 0.5}, 2 + 0 + 3),
        # Three tenths are not quite a tenth three times in floating point.
        ({"CPU": 0.1}, 160 + 160 + 30),
        ({"TPU": 1.0}, 0),
    ],
)
def test_what_one_node_must_hold_is_not_spread_over_two(each, room):
    assert room_for(each, NODES) == room


def test_what_no_node_can_hold_is_refused_with_the_largest_that_there_is():
    check_room(Need("tasks", {"CPU": 16.0}, 2), NODES, keys="cpus_per_task")
    said = (
        r"room for 0 tasks of 32 CPU, this job needs 1 at once: no node has more than 16 CPU: "
        r"add nodes .*lower cpus_per_task"
    )
    with pytest.raises(ConfigError, match=said):
        check_room(Need("tasks", {"CPU": 32.0}), NODES, keys="cpus_per_task")
    with pytest.raises(
        ConfigError, match=r"room for 1 actors of 4 CPU and 1 GPU.*16 CPU and 4 GPU"
    ):
        check_room(Need("actors", {"CPU": 4.0, "GPU": 1.0}, 2), NODES, keys="concurrency")


def test_needs_must_fit_together_and_each_for_itself_on_the_nodes(monkeypatch):
    monkeypatch.setattr("distrl.cluster.live_nodes", lambda: NODES)
    workers, ranking = Need("training workers", {"CPU": 4.0}, 8), Need("ranking workers", {})
    check_capacity([workers, ranking, Need("reading tasks", {"CPU": 1.5}, 2)], keys="k")
    said = r"has 35 CPU.* 36 at once \(8 training workers 32, 2 reading tasks 4\).*lower k"
    with pytest.raises(ConfigError, match=said):
        check_capacity([workers, ranking, Need("reading tasks", {"CPU": 2.0}, 2)], keys="k")
    # Three times 9 is within 35, but on no node twice.
    with pytest.raises(ConfigError, match="room for 2 training workers of 9 CPU, this job needs 3"):
        check_capacity([Need("training workers", {"CPU": 9.0}, 3)], keys="k")


def test_a_cluster_that_grows_is_waited_for_and_the_log_says_for_what(monkeypatch, caplog):
    monkeypatch.setattr("distrl.cluster.live_nodes", lambda: NODES)
    gpus = [Need("training workers", {"GPU": 2.0}, 4)]
    with pytest.raises(ConfigError, match=r"5 GPU, this job needs 8.*set DISTRL_CLUSTER_GROWS=1"):
        check_capacity(gpus, keys="k")
    monkeypatch.setenv("DISTRL_CLUSTER_GROWS", "0")
    with pytest.raises(ConfigError, match="5 GPU, this job needs 8"):
        check_capacity(gpus, keys="k")
    monkeypatch.setenv("DISTRL_CLUSTER_GROWS", "1")
    check_capacity(gpus, keys="k")
    check_capacity([Need("training workers", {"CPU": 9.0}, 3)], keys="k")
    assert "this job needs 8 at once" in caplog.text
    assert "room for 2 training workers of 9 CPU" in caplog.text
