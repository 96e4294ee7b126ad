"""Processes of one group, started as torchrun starts them, and how each of them ends."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from tests.integration.servers import free_port

REPOSITORY = Path(__file__).parents[1]


def run_ranks(
    world: int,
    module: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> str:
    """Runs `python -m module arguments` in `world` processes and returns what all of them said.

    One process alone is a plain one, which nobody launched.

    Raises:
        AssertionError: One of them ended with another code than 0.
        subprocess.TimeoutExpired: One of them hangs.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | dict(environment or {})
    port = str(free_port())
    launched = []
    for rank in range(world):
        named = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        named |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launched.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                cwd=REPOSITORY,
                env=env | (named if world > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=timeout_s)[0] for process in launched]
    finally:
        for process in launched:
            process.kill()
    codes = [process.returncode for process in launched]
    assert codes == [0] * world, "\n".join(said)[-4000:]
    return "".join(said)


def end_rank() -> NoReturn:
    """Ends a process of `run_ranks` that has written what it found, past the interpreter's own end.

    That end aborts the process where it finds a thread of gloo on its way into the interpreter
    (pytorch#190489), and destroying the group first does not end those threads: parameters of
    ZeRO 3 hold the group too.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
