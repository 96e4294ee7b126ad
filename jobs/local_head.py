"""A Ray head on this machine, on loopback, with a job server: a cluster to submit to."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrl.errors import DistrlError

START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 120
_PORTS = range(20_000, 30_000)
"""Above those that Ray gives its workers, below those that kernels give connections."""
_STOP_WAIT_S = "60"
"""How long Ray lets a job end by itself that it is told to stop; 3 s by default, in which a run can
hardly save what MLflow must know."""
RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def ray_head(num_cpus: int, log: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Runs a head until the block ends, on ports that nobody uses.

    Args:
        num_cpus: Logical CPUs; may be more than the machine has.
        log: File for what the head says.

    Yields:
        The job server's address, and the environment that a client of it needs.

    Raises:
        DistrlError: If it does not start.
    """
    port, dashboard, client, agent, metrics = free_ports(5)
    # A dashboard on loopback asks for a token, which clients send only in this mode.
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    environment.pop("RAY_ADDRESS", None)
    environment.setdefault("RAY_JOB_STOP_WAIT_TIME_S", _STOP_WAIT_S)
    # Where no Ray has run before there is none yet, and a head does not make one.
    make_token = [RAY, "get-auth-token", "--generate"]
    subprocess.run(make_token, env=environment, stdout=subprocess.DEVNULL, check=True)
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", f"--num-cpus={num_cpus}",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            _wait_for(dashboard, head, log)
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            head.terminate()
            try:
                head.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                head.kill()
                raise


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses, and that no connection is given before they are."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(_PORTS)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the head's job server answers, if only to ask for a token."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise DistrlError(f"the Ray head ended with status {head.returncode}: see {log}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise DistrlError(f"the Ray head did not answer within {START_TIMEOUT_S} s: see {log}")
