"""Engine settings, and the one place that spells DeepSpeed's keys."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distrl.errors import ConfigError
from distrl.schema import Config

Beta = Annotated[float, Ge(0), Lt(1)]


class EngineConfig(Config):
    """Everything that decides how a part moves, so that no vendor default does."""

    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed shards over the workers: optimizer state and master weights (1), gradients too
    (2), parameters too (3). Stage 3 gathers all parameters for a phase and shards them again after
    it; every stage gives the same numbers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: parameters, activations and gradients in bfloat16; master weights, optimizer state and
    the mean of the gradients over workers in float32."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """torch.optim.Adam (never AdamW, which DeepSpeed's "Adam" means) or torch.optim.SGD."""
    lr: PositiveFloat = 1e-3
    """Learning rate of every part that `lr_of` does not name."""
    lr_of: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Learning rates of single parts, such as {"augmenters": 1e-4}."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs, or a part of one, over which learning rates rise from zero, linearly."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How learning rates fall to zero by the end of `decay_epochs`; the papers keep them."""
    decay_epochs: PositiveFloat | None = None
    """When they reach zero; no less than training.epochs."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of Adam; the papers' setting."""
    eps: PositiveFloat = 1e-8
    """Of Adam, added outside the square root."""
    momentum: Beta = 0.0
    """Of SGD, without dampening and not Nesterov's."""
    weight_decay: NonNegativeFloat = 0.0
    """Added to the gradient times the weight (L2), not decoupled from it."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Norm that a part's gradient over all workers is scaled down to; 0 leaves it alone, as the
    papers do. DeepSpeed's own default is 1.0."""
    reduce_bucket_numel: PositiveInt = 2**24
    """Gradient elements reduced at a time; decides memory (4 bytes each), not numbers."""

    def lr_for(self, part: str) -> float:
        """Learning rate of one part."""
        return self.lr_of.get(part, self.lr)

    def lr_factor(self, epoch: float) -> float:
        """What learning rates are multiplied by.

        Args:
            epoch: Samples consumed since the run began, over samples of an epoch: the same after a
                restart, and at any number of workers.
        """
        rising = 1.0 if epoch >= self.warmup_epochs else epoch / self.warmup_epochs
        if self.decay_epochs is None:
            return rising
        done = min(epoch / self.decay_epochs, 1.0)
        falling = 1.0 - done if self.decay == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
        return min(rising, falling)

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> "EngineConfig":
        if (self.decay == "none") != (self.decay_epochs is None):
            raise ValueError(
                f"decay={self.decay} with decay_epochs={self.decay_epochs}: set both, or neither"
            )
        return self

    def check_parts(self, parts: Iterable[str]) -> None:
        """Whether every part that `lr_of` names exists.

        Raises:
            ConfigError: Naming the parts that the method does not have.
        """
        known = sorted(parts)
        unknown = sorted(set(self.lr_of) - set(known))
        if unknown:
            raise ConfigError(
                f"engine.lr_of names {', '.join(unknown)}; the method's parts are "
                f"{', '.join(known)}"
            )

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the optimizer's per-weight state, as torch.optim spells them."""
        if self.optimizer == "adam":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum > 0 else ()

    def deepspeed_dict(self, micro_batch_size: int, num_workers: int) -> dict[str, Any]:
        """The config `deepspeed.initialize` takes; nothing else in distrl spells its keys.

        The same for every part: what differs between parts is in the optimizer object.

        Args:
            micro_batch_size: Samples a worker takes per step; DeepSpeed wants it and no number
                depends on it.
            num_workers: Ranks in the process group.
        """
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            "train_batch_size": micro_batch_size * num_workers,
            "gradient_clipping": self.max_grad_norm,
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "gradient_allreduce_op": "mean",
            "communication_data_type": "fp32",
            # By default gradients in bf16 are averaged, and the mean rounded, in bf16.
            "data_types": {"grad_accum_dtype": "fp32"},
            "fp16": {"enabled": False},
            "bf16": {
                "enabled": self.precision == "bf16",
                "bf16_master_weights_and_grads": False,
                "bf16_optimizer_states": False,
                "check_grad_overflow": True,
            },
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": False,
                "contiguous_gradients": True,
                "reduce_scatter": True,
                "round_robin_gradients": False,
                "reduce_bucket_size": self.reduce_bucket_numel,
                "allgather_bucket_size": self.reduce_bucket_numel,
                # Stage 3 would replace torch.nn.functional.linear in the whole process.
                "memory_efficient_linear": False,
                # Every parameter is sharded, so that small tests take the road of large tables.
                "stage3_param_persistence_threshold": 0,
            },
            "wall_clock_breakdown": False,
        }
