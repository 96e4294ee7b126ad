"""The process group, and the few small collectives that the training loop needs.

Everything here works on host memory, so it goes over gloo even where gradients go over NCCL.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distrl.errors import DistrlError

T = TypeVar("T")

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ensure_process_group(backend: Literal["gloo", "nccl"]) -> None:
    """Makes the process group of this run, whoever started the processes.

    Ray Train has made one already: it stays. Under torchrun, or anything else that sets RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT, the processes find each other there. A process that
    nobody launched is a group of its own, kept in memory, so that it opens no port.

    Collective, where there are several ranks.

    Args:
        backend: Of the gradients: "gloo" for CPUs, "nccl" for GPUs.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if dist.is_initialized():
        return
    if all(key in os.environ for key in LAUNCHER_KEYS):
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def rank() -> int:
    """This worker's number in the process group, 0 for the first."""
    return dist.get_rank()


def world_size() -> int:
    """Workers in the process group."""
    return dist.get_world_size()


@functools.lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group over the ranks of `world`; remembered, since making one is a collective."""
    if dist.get_backend(world) == "gloo":
        return world
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every rank belongs to the group of all ranks"
    return group


def host_group() -> dist.ProcessGroup:
    """The gloo group of all ranks. Its first use is a collective."""
    world = dist.group.WORLD
    assert world is not None, "call ensure_process_group first"
    return _host_group(world)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, in float64. Collective."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=host_group())
    return total.tolist()


def gather_objects(value: T) -> list[T]:
    """Every rank's object, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=host_group())
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's object, on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]


def together(do: Callable[[], T]) -> T:
    """What `do` returns, if it does so on every rank, so that none waits for one that has failed.

    Collective.

    Raises:
        DistrlError: On all ranks, what the first rank where `do` fails has raised.
    """
    done, failed = [], None
    try:
        done.append(do())
    except DistrlError as error:
        failed = error
    failures = [error for error in gather_objects(failed) if error is not None]
    if failures:
        raise failures[0]
    return done[0]


def gather_rows(rows: Tensor) -> Tensor:
    """Every rank's rows, in rank order, on every rank; ranks may hold different numbers of them.

    Its gradient on a rank is the sum over ranks of the gradients of that rank's rows. A mean over
    ranks of a loss on the gathered rows that all compute alike has thus the gradient that one
    process with all rows would have. Collective, in the backward too where gradients are asked for.

    Args:
        rows: One a row; all axes but the first are the same on all ranks.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)  # pyright: ignore[reportReturnType]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows forward, the sum of all ranks' gradients backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ANN401
        ctx.counts = gather_objects(len(rows))
        padded = rows.new_zeros((max(ctx.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[rank()]
