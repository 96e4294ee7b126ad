"""How a job reaches Ray: the cluster that RAY_ADDRESS names, or a Ray of its own."""

import logging
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence

import ray
import ray.data
from ray.exceptions import RayError

from distrl.errors import ConfigError


def connect(num_cpus: float) -> None:
    """Connects this process to Ray, once.

    With RAY_ADDRESS in the environment, as in a submitted job, that cluster is used. Without it a
    Ray is started on this machine, with at least `num_cpus` logical CPUs: on a small machine
    processes then share the real ones.

    Raises:
        ConfigError: If the cluster cannot be reached.
    """
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    # Progress bars and a hint at a dashboard that is off are noise beside the job's own lines.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            local = max(os.cpu_count() or 1, math.ceil(num_cpus))
            ray.init(address="local", num_cpus=local, include_dashboard=False, **quiet)
    except (ConnectionError, RayError) as error:
        raise ConfigError(f"RAY_ADDRESS={address} cannot be reached: {error}") from error
    if callable(on_termination) and threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own in place, which aborts with a trace of C++ frames.
        signal.signal(signal.SIGTERM, on_termination)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def check_capacity(needs: dict[str, dict[str, float]]) -> None:
    """Proves that the cluster can ever hold what a job needs at the same time.

    Args:
        needs: For each purpose, its Ray resources, such as {"2 workers": {"CPU": 2.0}}.

    Raises:
        ConfigError: Naming the resource, what each purpose takes, and what the cluster has. Ray
            itself would wait without end.
    """
    there = ray.cluster_resources()
    for resource in sorted({name for need in needs.values() for name in need}):
        wanted = sum(need.get(resource, 0.0) for need in needs.values())
        if wanted > there.get(resource, 0.0) + 1e-9:
            parts = ", ".join(
                f"{purpose} {need[resource]:g}"
                for purpose, need in needs.items()
                if resource in need
            )
            raise ConfigError(
                f"the cluster has {there.get(resource, 0.0):g} {resource}, this job needs "
                f"{wanted:g} at once ({parts}): add nodes, or lower workers.num_workers, "
                "workers.cpus_per_worker or evaluation.num_workers"
            )


def live_nodes() -> list[dict[str, float]]:
    """Ray resources of each node that is up, whether they are taken or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room_for(each: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many tasks or actors of one size some nodes hold at a time, each of them on one node."""
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount)
        for node in nodes
    )


def check_room(
    what: str,
    each: Mapping[str, float],
    count: int,
    nodes: Sequence[Mapping[str, float]],
    *,
    keys: str,
) -> None:
    """Proves that some nodes can ever hold so many tasks or actors of one size at a time.

    Args:
        what: They are, in the plural.
        each: Ray resources of one, such as {"CPU": 2.0}.
        count: How many.
        nodes: As `live_nodes` gives.
        keys: Of the config, that make them fewer or smaller.

    Raises:
        ConfigError: Naming what one takes, for how many there is room, and the largest node. Ray
            itself would wait without end.
    """
    room = room_for(each, nodes)
    if room >= count:
        return
    size = " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
    most = " and ".join(
        f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}"
        for name, amount in each.items()
        if amount
    )
    raise ConfigError(
        f"the cluster has room for {room} {what} of {size}, this job needs {count} at once: no "
        f"node has more than {most}; add nodes that are large enough, or lower {keys}"
    )
