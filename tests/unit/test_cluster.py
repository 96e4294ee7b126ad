import pytest

from distrl.cluster import check_room, room_for
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
    check_room("tasks", {"CPU": 16.0}, 2, NODES, keys="cpus_per_task")
    said = (
        r"room for 0 tasks of 32 CPU, this job needs 1 at once: no node has more than 16 CPU; "
        r"add nodes .*lower cpus_per_task"
    )
    with pytest.raises(ConfigError, match=said):
        check_room("tasks", {"CPU": 32.0}, 1, NODES, keys="cpus_per_task")
    with pytest.raises(
        ConfigError, match=r"room for 1 actors of 4 CPU and 1 GPU.*16 CPU and 4 GPU"
    ):
        check_room("actors", {"CPU": 4.0, "GPU": 1.0}, 2, NODES, keys="concurrency")
