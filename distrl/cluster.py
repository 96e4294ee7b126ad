"""How a job reaches Ray: the cluster that RAY_ADDRESS names, or a Ray of its own."""

import logging
import math
import os
import signal
import threading

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
