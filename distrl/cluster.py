"""How a job reaches Ray: the cluster that RAY_ADDRESS names, or a Ray of its own."""

import logging
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import ray.data
from ray.exceptions import RayError

from distrl.errors import ConfigError

logger = logging.getLogger(__name__)

GROWS = "DISTRL_CLUSTER_GROWS"
"""In a job's environment, such as of a submitted one: an autoscaler adds the nodes that a job asks
for. Ray itself cannot tell what a cluster could grow to."""


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


@dataclass(frozen=True, slots=True)
class Need:
    """Tasks or actors of one size that a job runs at the same time."""

    what: str
    """They are, in the plural."""
    each: Mapping[str, float]
    """Ray resources of one, such as {"CPU": 2.0}, all of them on one node."""
    count: int = 1

    def total(self, resource: str) -> float:
        """What all of them take of one resource."""
        return self.each.get(resource, 0.0) * self.count


def check_capacity(needs: Sequence[Need], *, keys: str) -> None:
    """Proves that the cluster can ever hold what a job needs at the same time.

    Each need for itself must fit on the nodes, and all needs together into the cluster's sum. That
    they also fit beside each other on the nodes is not proven. A cluster that GROWS may lack
    something now; then the log says what, and Ray waits for nodes.

    Args:
        needs: All that run at once.
        keys: Of the config, that make them fewer or smaller.

    Raises:
        ConfigError: Naming the resource, what each purpose takes, and what the cluster has. Ray
            itself would wait without end.
    """
    nodes = live_nodes()
    for resource in sorted({name for need in needs for name in need.each}):
        there = sum(node.get(resource, 0.0) for node in nodes)
        wanted = sum(need.total(resource) for need in needs)
        if wanted > there + 1e-9:
            parts = ", ".join(
                f"{need.count} {need.what} {need.total(resource):g}"
                for need in needs
                if need.total(resource)
            )
            _lacks(
                f"the cluster has {there:g} {resource}, this job needs {wanted:g} at once "
                f"({parts})",
                f"add nodes, or lower {keys}",
            )
            return
    for need in needs:
        check_room(need, nodes, keys=keys)


def _lacks(problem: str, remedy: str) -> None:
    if os.environ.get(GROWS, "0").lower() in ("", "0", "no", "false", "off"):
        raise ConfigError(f"{problem}: {remedy}; where nodes are added on demand, set {GROWS}=1")
    logger.warning("%s: waiting for nodes, as %s is set", problem, GROWS)


def live_nodes() -> list[dict[str, float]]:
    """Ray resources of each node that is up, whether they are taken or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room_for(each: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many tasks or actors of one size some nodes hold at a time, each of them on one node."""
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount)
        for node in nodes
    )


def check_room(need: Need, nodes: Sequence[Mapping[str, float]], *, keys: str) -> None:
    """Proves that some nodes can ever hold a need, each of its tasks or actors on one of them.

    Args:
        need: What must find room; without any resource it always does.
        nodes: As `live_nodes` gives.
        keys: Of the config, that make it fewer or smaller.

    Raises:
        ConfigError: Naming what one takes, for how many there is room, and the largest node. Ray
            itself would wait without end.
    """
    each = {name: amount for name, amount in need.each.items() if amount}
    if not each or (room := room_for(each, nodes)) >= need.count:
        return
    size = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
    most = " and ".join(
        f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}" for name in each
    )
    _lacks(
        f"the cluster has room for {room} {need.what} of {size}, this job needs {need.count} at "
        f"once: no node has more than {most}",
        f"add nodes that are large enough, or lower {keys}",
    )
