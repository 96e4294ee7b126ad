"""One DeepSpeed engine per part of a method. Knows no Ray: one process, torchrun, anything."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrl.contract import Batch, Losses, Method, Phase, Unit
from distrl.engine.collectives import gather_objects, gather_rows, world_size
from distrl.engine.config import EngineConfig
from distrl.engine.graph import reach, with_gradients
from distrl.engine.shards import Shard, shard_of, write_weight
from distrl.engine.vendor import load_deepspeed
from distrl.errors import DivergedError


class _Holder(nn.Module):
    """What DeepSpeed takes for its model: the parameters of one part, and the identity on a loss.

    The method itself stays plain. ZeRO's hooks on modules would meet tied tables, sub-modules that
    one rank skips and another does not, results that are no tensors, and each other; on this module
    they find nothing but a scalar. Gradients are reduced by hooks on the parameters, which
    DeepSpeed sets whichever module holds them.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, total: Tensor) -> Tensor:
        return total


class Engines:
    """One DeepSpeed engine per part of a method; the method's phases decide which one moves.

    Weights start as rank 0's. Between two steps the method's own parameters are the current
    weights, in the configured precision; at stage 3 they are sharded, and `gathered` shows them.

    A parameter that a phase trains and that no loss reaches has a gradient of zero, so that ranks
    may hold unequal batches: one without pairs takes part in what the others reduce.
    """

    def __init__(
        self,
        method: Method,
        config: EngineConfig,
        *,
        device: torch.device,
        micro_batch_size: int,
        num_workers: int,
    ) -> None:
        """Wraps the method. Collective.

        Args:
            method: Moved to `device`, in place. In bf16 its trained parameters are cast, and what
                is not trained, buffers too, keeps its type.
            config: What to wrap it in.
            device: Where it runs; a GPU is the one that LOCAL_RANK names.
            micro_batch_size: Samples a worker takes per step.
            num_workers: Ranks in the process group, which exists already.

        Raises:
            ConfigError: If a learning rate is meant for a part that does not exist.
            ValueError: If the parts do not hold every trainable parameter exactly once.
        """
        config.check_parts(method.parts)
        self._trained = _trained_parameters(method)
        self.method, self.config, self.device = method.to(device), config, device
        self.units: dict[str, Unit] = {}
        """What each term met so far is a mean over."""
        method.gather = gather_rows
        self._deepspeed = load_deepspeed(device.type)
        _broadcast(method)
        # DeepSpeed rounds the weights first and makes the master copies of what is left.
        rounded = list(self.parameters()) if config.precision == "bf16" else []
        exact = [parameter.detach().clone() for parameter in rounded]
        settings = config.deepspeed_dict(micro_batch_size, num_workers)
        self._engines = {part: self._wrap(part, settings) for part in self._trained}
        for parameter, value in zip(rounded, exact, strict=True):
            write_weight(parameter, self.shard(parameter), value)

    def _wrap(self, part: str, settings: dict[str, Any]) -> Any:  # noqa: ANN401
        """DeepSpeed's engine around one part."""
        parameters = self._trained[part]
        with redirect_stdout(StringIO()):  # in bf16 it prints its memory, unasked
            engine, *_ = self._deepspeed.initialize(
                model=_Holder(parameters),
                model_parameters=parameters,
                optimizer=_optimizer(self.config, part, parameters),
                config=dict(settings),
                dist_init_required=False,
            )
        return engine

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that some phase may move."""
        for parameters in self._trained.values():
            yield from parameters

    @property
    def parts(self) -> Mapping[str, list[nn.Parameter]]:
        """Trained parameters of each part."""
        return self._trained

    def shard(self, parameter: nn.Parameter) -> Shard | None:
        """This rank's piece of a trained parameter; None where it has none."""
        for part, parameters in self._trained.items():
            if any(parameter is own for own in parameters):
                zero = self._engines[part].optimizer
                return shard_of(zero, parameter, self.config.zero_stage)
        raise ValueError("not a parameter that the engines move")

    def set_epoch(self, epoch: float) -> None:
        """Sets all learning rates to what the config says for samples consumed, in epochs."""
        factor = self.config.lr_factor(epoch)
        for part, engine in self._engines.items():
            for group in engine.optimizer.param_groups:
                group["lr"] = self.config.lr_for(part) * factor

    def gathered(self) -> AbstractContextManager[None]:
        """Within it the method's parameters are whole on every rank, whatever the stage.

        They may be read, not written. Collective.
        """
        if self.config.zero_stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(self.parameters()))

    def step(
        self, batch: Batch, phase: Phase, shares: Mapping[Unit, float], *, step: int
    ) -> dict[str, Tensor]:
        """Forward, check, backward and optimizer step of the parts that a phase trains. Collective.

        Args:
            batch: This worker's, on the engines' device.
            phase: One of the method's.
            shares: This worker's count of each unit divided by the mean count per worker.
            step: For messages.

        Returns:
            The detached value of each term, neither weighted nor scaled by its share, and `total`.

        Raises:
            DivergedError: On every rank, if the total is not finite on any, or if a gradient is
                not; no weight has moved then, except by earlier phases and, if it is a gradient of
                one of several parts, by the parts before it.
        """
        with self.gathered():
            values = self._backward(batch, phase, shares, step)
        for part in phase.trains:
            self._engines[part].step()
            if not self._engines[part].was_step_applied():
                raise DivergedError(
                    f"phase {phase.name}, step {step}: the gradient of {part} is not finite, "
                    f"though its loss is ({_listed(values)}); the optimizer has not moved"
                )
        return values

    def _backward(
        self, batch: Batch, phase: Phase, shares: Mapping[Unit, float], step: int
    ) -> dict[str, Tensor]:
        """Leaves the gradient of each part with its engine, and moves nothing."""
        for name, parameters in self._trained.items():
            for parameter in parameters:
                parameter.requires_grad_(name in phase.trains)
        losses = self.method(batch, phase)
        total = losses.total(shares)
        self.units |= {name: term.unit for name, term in losses.terms.items()}
        values = _values(losses, total)
        self._check_finite(total, values, phase, step)
        for part, own in self._shared_out(total, phase.trains):
            engine = self._engines[part]
            engine.backward(engine(own))
        return values

    def _shared_out(self, total: Tensor, parts: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """For each part the total as its engine may take it; one backward of the graph in all."""
        if len(parts) == 1:
            yield parts[0], reach(total, self._trained[parts[0]])
            return
        trained = [parameter for part in parts for parameter in self._trained[part]]
        reached = total.requires_grad
        found = torch.autograd.grad(total, trained, allow_unused=True) if reached else None
        gradients = iter(found or [None] * len(trained))
        for part in parts:
            own = self._trained[part]
            yield part, with_gradients(total, own, [next(gradients) for _ in own])

    def _check_finite(
        self, total: Tensor, values: Mapping[str, Tensor], phase: Phase, step: int
    ) -> None:
        """All ranks go on, or none does."""
        finite = torch.isfinite(total.detach()).to(torch.int32)
        if world_size() > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item():
            return
        found = gather_objects(_listed(values))
        ranks = "; ".join(f"rank {rank}: {listed}" for rank, listed in enumerate(found))
        raise DivergedError(
            f"phase {phase.name}, step {step}: the loss is not finite ({ranks}); "
            "the optimizer has not moved"
        )


def _optimizer(
    config: EngineConfig, part: str, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The torch optimizer of one part, with every default that changes numbers spelled out."""
    lr = config.lr_for(part)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=lr,
            momentum=config.momentum,
            dampening=0.0,
            nesterov=False,
            weight_decay=config.weight_decay,
        )
    return torch.optim.Adam(
        parameters,
        lr=lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=False,
        # One pass over weights, gradients and moments where the default takes some ten: a fifth
        # of its time on a table of 12,000 items. Rounds differently from it, by parts in 1e8.
        fused=True,
    )


def _trained_parameters(method: Method) -> dict[str, list[nn.Parameter]]:
    """The parameters that require a gradient, by part.

    Raises:
        ValueError: If one is in no part or in two.
    """
    parts = {
        name: [p for p in part.parameters() if p.requires_grad]
        for name, part in method.parts.items()
    }
    holders: dict[int, list[str]] = {}
    for part, parameters in parts.items():
        for parameter in parameters:
            holders.setdefault(id(parameter), []).append(part)
    for name, parameter in method.named_parameters():
        held = holders.get(id(parameter), [])
        if parameter.requires_grad and len(held) != 1:
            where = f"parts {', '.join(held)}" if held else "no part"
            raise ValueError(f"parameter {name} is in {where} of the method; it must be in one")
    return {name: parameters for name, parameters in parts.items() if parameters}


def _broadcast(method: Method) -> None:
    """Every rank starts from rank 0's parameters and buffers. Collective."""
    if world_size() > 1:
        for tensor in [*method.parameters(), *method.buffers()]:
            dist.broadcast(tensor.data, src=0)


def _values(losses: Losses, total: Tensor) -> dict[str, Tensor]:
    """What a phase reports, cut off from the graph."""
    values = {name: term.value.detach() for name, term in losses.terms.items()}
    return values | {"total": total.detach()}


def _listed(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}={value.item():.6g}" for name, value in values.items())
