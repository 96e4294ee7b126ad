"""Real servers for tests: a Ray cluster of several nodes, MLflow, and jobs as users run them."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from jobs.local_head import free_ports

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 120


def free_port() -> int:
    """A port on loopback that nobody uses at present."""
    (port,) = free_ports(1)
    return port


def run_job(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 400
) -> subprocess.CompletedProcess[str]:
    """Runs `python jobs/<arguments>` as a user does and returns what it said."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=job_environment(environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@contextmanager
def job_process(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdout: IO[str] | int = subprocess.PIPE,
    stderr: IO[str] | int = subprocess.STDOUT,
) -> Iterator[subprocess.Popen[str]]:
    """`python jobs/<arguments>` while it runs; what is left of it at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=job_environment(environment),
        stdout=stdout,
        stderr=stderr,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


def kill_with_children(process: subprocess.Popen) -> None:
    """Kills a driver and all that it started, none of which notices before its own end."""
    children = psutil.Process(process.pid).children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.suspend()
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def ended(process: subprocess.Popen, timeout_s: float) -> None:
    """Waits for a server that was asked to end, and kills one that does not."""
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def job_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a job: one thread a process, nothing of another cluster."""
    foreign = ("RAY_", "AWS_", "MLFLOW_", "DISTRL_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {**inherited, "OMP_NUM_THREADS": "1", **(environment or {})}


def elsewhere(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module gives in a process of its own.

    For what would make the tests' own process a process group, which later tests may not want.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def ray_here(cpus: int = 2) -> Iterator[None]:
    """Ray in this process, of its own and alone."""
    import ray  # most tests start it in a job of its own

    # Short, because the paths of Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayCluster:
    """A cluster on this machine, ended by its own process."""

    address: str
    commands: IO[str]

    def add_node(self, **arguments: object) -> None:
        """One node more, with such arguments as `num_cpus`."""
        self.commands.write(json.dumps(arguments) + "\n")
        self.commands.flush()


@contextmanager
def ray_cluster(
    environment: Mapping[str, str], nodes: int = 2, cpus: int = 4
) -> Iterator[RayCluster]:
    """A cluster of several nodes, to which others can be added."""
    script = (
        "import json, sys\n"
        "from ray.cluster_utils import Cluster\n"
        f"cluster = Cluster(initialize_head=True, head_node_args={{'num_cpus': {cpus}, "
        "'include_dashboard': False})\n"
        f"[cluster.add_node(num_cpus={cpus}) for _ in range({nodes - 1})]\n"
        "print('ADDRESS', cluster.address, flush=True)\n"
        "for line in sys.stdin:\n"
        "    cluster.add_node(**json.loads(line))\n"
        "cluster.shutdown()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=job_environment(environment),
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("ADDRESS"):
                yield RayCluster(line.split()[1], process.stdin)
                break
        else:
            raise AssertionError(f"the cluster did not start: status {process.wait()}")
    finally:
        process.stdin.close()
        ended(process, timeout_s=120)


@contextmanager
def mlflow_server(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    artifacts: str | None = None,
    port: int | None = None,
) -> Iterator[str]:
    """An MLflow server on loopback with SQLite; yields its URI. Ended by pid, with its workers."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", artifacts or str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command,
            # Its background jobs are for features that no test uses, and double its start.
            env=job_environment(
                {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}
            ),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until_healthy(port, process, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        ended(process, timeout_s=60)


def until_healthy(port: int, process: subprocess.Popen, log: Path) -> None:
    """Until an MLflow server, of runs or of a model, answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"mlflow ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"mlflow is not healthy: {log.read_text()[-2000:]}")


def write_events(path: Path, *, users: int, items: int, seed: int = 0) -> None:
    """A raw log as CSV in which the next item mostly follows from the last: something to learn."""
    rng = random.Random(seed)
    lines = []
    for user in range(users):
        item = rng.randrange(items)
        for step in range(rng.randrange(6, 16)):
            lines.append(f"u{user},i{item:04d},{1_600_000_000 + 1000 * step + user}")
            item = (item + 1) % items if rng.random() < 0.8 else rng.randrange(items)
    rng.shuffle(lines)
    path.write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")


def small_run(name: str, store_uri: str, storage_uri: str, tracking_uri: str) -> dict:
    """Settings of a training run that takes seconds."""
    return {
        "name": name,
        "storage_uri": storage_uri,
        "registered_model": "road",
        "data": {"store_uri": store_uri, "batch_size": 64, "max_len": 12},
        "method": {"name": "mclrec", "hidden_size": 16, "inner_size": 32, "dropout": 0.1,
                   "attention_dropout": 0.1},
        "workers": {"num_workers": 2, "cpus_per_worker": 0.5},
        "training": {"epochs": 3, "progress_every_s": 1.0},
        "evaluation": {"num_workers": 1, "cpus_per_worker": 0.5},
        "tracking": {"uri": tracking_uri},
    }  # fmt: skip


def write_config(settings: dict) -> str:
    """A config file; JSON is YAML."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        json.dump(settings, file)
    return file.name
