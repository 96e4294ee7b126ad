"""Where DeepSpeed keeps this rank's piece of a parameter: the one place that knows its insides.

At every stage a rank owns a flat float32 master copy of its pieces, and the optimizer's state has
the same layout. DeepSpeed's own accessors (`safe_get_full_fp32_param` and its kin) do not do: they
know no optimizer state before the first step, and leave the working copy of a weight as it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrl.engine.collectives import rank, world_size


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's piece of one parameter, which may be empty."""

    master: Tensor
    """The rank's flat float32 master copy, which holds pieces of many parameters."""
    optimizer: torch.optim.Optimizer
    """Keeps the state of `master`."""
    at: int
    """Where in the master copy the piece begins."""
    start: int
    """Where in the flattened parameter it begins."""
    count: int
    """Elements."""

    def piece(self, flat: Tensor) -> Tensor:
        """The view of the piece in something laid out like the master copy."""
        return flat.narrow(0, self.at, self.count)

    def piece_of_parameter(self, full: Tensor) -> Tensor:
        """The view of the piece in the whole parameter."""
        return full.flatten().narrow(0, self.start, self.count)

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state of the master copy; empty before the first step."""
        return self.optimizer.state[self.master]


def shard_of(zero: Any, parameter: nn.Parameter, stage: int) -> Shard | None:  # noqa: ANN401
    """This rank's piece of a parameter that `zero`, an engine's optimizer, moves.

    None where the rank holds no element of it.
    """
    if stage == 3:
        return _partitioned_shard(zero, parameter)
    mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is None:
        return None
    master = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
    return Shard(
        master,
        zero.optimizer,
        at=mapping.hp_fragment_address.start,
        start=mapping.lp_fragment_address.start,
        count=mapping.hp_fragment_address.numel,
    )


def _partitioned_shard(zero: Any, parameter: nn.Parameter) -> Shard | None:  # noqa: ANN401
    """Stage 3 cuts each parameter into equal pieces, the last one padded."""
    group, at, width = zero.grad_position[zero.get_param_id(parameter)]
    start = rank() * width
    count = min(width, _numel(parameter) - start)
    if count <= 0:
        return None
    master = zero.fp32_partitioned_groups_flat[group]
    return Shard(master, zero.optimizer, at=at, start=start, count=count)


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; sharded by stage 3, its own count is that of nothing."""
    return shape_of(parameter).numel()


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, sharded or not."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape  # pyright: ignore[reportAttributeAccessIssue]


def assemble(piece: Tensor | None, shard: Shard | None, parameter: nn.Parameter) -> Tensor | None:
    """The whole of what each rank holds a piece of, on rank 0 and on the host. Collective.

    The bits are added, not the numbers, so that negative zeros and NaNs survive.

    Args:
        piece: This rank's elements, float32; None counts as zeros.
        shard: Where they belong; None where the rank has none.
        parameter: Of the shape that is assembled.
    """
    full = torch.zeros(_numel(parameter), dtype=torch.float32, device=parameter.device)
    if piece is not None and shard is not None:
        shard.piece_of_parameter(full).copy_(piece)
    if world_size() > 1:
        dist.reduce(full.view(torch.int32), dst=0)
    return full.view(shape_of(parameter)).cpu() if rank() == 0 else None


def write_weight(parameter: nn.Parameter, shard: Shard | None, full: Tensor) -> None:
    """Sets this rank's master copy and working copy of a weight from its whole, float32."""
    if shard is not None:
        shard.piece(shard.master.data).copy_(shard.piece_of_parameter(full))
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(full)
    elif shard is not None:
        working: Tensor = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        working.data.narrow(0, 0, shard.count).copy_(shard.piece_of_parameter(full))
