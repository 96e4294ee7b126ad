"""What a training step cannot do without: operations and bytes, and the time a machine needs.

Counted is what the mathematics asks for, perfectly fused, and not what our code happens to do:
attention over the pairs of slots that may see each other, not over whole rows; each elementwise
chain as one pass; nothing for indices, random draws, copies and Python. A share of the limit is
therefore never flattered by waste of our own. Exponentials, of which a full softmax takes one a
target and item, are neither products nor bytes: they are counted apart, for a second limit beside
the plain one. Dimensions as in `distrl.nn.encoder`.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from typing import Literal

from distrl.contract import Batch, Method, Packed, Phase
from distrl.methods.encoding import EncoderConfig
from distrl.methods.mclrec import MCLRecConfig
from distrl.nn.attention import visible_keys

FLOAT_BYTES = 4
BACKWARD = 2
"""A product's backward is two products, an elementwise pass's reads and writes twice as much."""


@dataclass(frozen=True)
class Work:
    """Operations and traffic of some part of a step."""

    fp32_flops: float = 0.0
    bf16_flops: float = 0.0
    activation_bytes: float = 0.0
    """Read and written in passes over activations, which can stay in a processor's cache."""
    state_bytes: float = 0.0
    """Read and written by the optimizer: more than stays in a cache from step to step."""
    exponentials: float = 0.0
    """Of the softmaxes."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            *(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True))
        )

    def times(self, factor: float) -> "Work":
        """The same work `factor` times."""
        return Work(*(amount * factor for amount in astuple(self)))


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do, in operations and bytes per second."""

    fp32_flops: float
    bf16_flops: float
    cache_bytes: float
    memory_bytes: float
    exponentials: float


def limit_s(work: Work, rates: Rates) -> float:
    """Seconds the machine needs: a product is bound by its operations, a pass by its bytes."""
    return (
        work.fp32_flops / rates.fp32_flops
        + work.bf16_flops / rates.bf16_flops
        + work.activation_bytes / rates.cache_bytes
        + work.state_bytes / rates.memory_bytes
    )


def limit_with_softmax_s(work: Work, rates: Rates) -> float:
    """The same with the exponentials at the rate of torch's softmax in a cache."""
    return limit_s(work, rates) + work.exponentials / rates.exponentials


def linear(rows: int, inputs: int, outputs: int) -> Work:
    """One product of a matrix of activations and one of weights."""
    return Work(fp32_flops=2.0 * rows * inputs * outputs)


def one_pass(elements: int, reads: int = 1) -> Work:
    """`reads` arrays read and one written."""
    return Work(activation_bytes=(reads + 1.0) * elements * FLOAT_BYTES)


def encoder_forward(slots: int, asked: int, seen: int, config: EncoderConfig) -> Work:
    """One forward pass.

    Args:
        slots: Items in the packed rows, padding left out.
        asked: States that are wanted of the last block.
        seen: Pairs of a slot and one that it may look at.
        config: Sizes.
    """
    D, I = config.hidden_size, config.inner_size  # noqa: E741
    total = one_pass(slots * D, reads=2)  # embeddings, norm, dropout
    for layer in range(config.num_layers):
        out = asked if layer == config.num_layers - 1 else slots
        total += linear(slots, D, 3 * D) + linear(out, D, D)
        total += linear(out, D, I) + linear(out, I, D)
        looking = seen if out == slots else seen * asked / max(slots, 1)
        total += Work(fp32_flops=2 * 2.0 * looking * D)  # scores, and the mix of values
        shares = int(looking) * config.num_heads
        total += one_pass(shares) + Work(exponentials=shares)  # softmax and dropout
        total += one_pass(out * I)  # GELU
        total += one_pass(out * D, reads=2).times(2)  # residual, dropout and norm, twice
    return total


def next_item(targets: int, items: int, hidden: int, products: Literal["fp32", "bf16"]) -> Work:
    """Logits, and the gradients of states and table: three products, and one softmax pass."""
    flops = 3 * 2.0 * targets * items * hidden
    size = FLOAT_BYTES if products == "fp32" else FLOAT_BYTES // 2
    logits = targets * items
    softmax = Work(activation_bytes=2.0 * size * logits, exponentials=logits)
    return softmax + (Work(fp32_flops=flops) if products == "fp32" else Work(bf16_flops=flops))


def contrast(pairs: int, hidden: int) -> Work:
    """All similarities of 2P views with each other, a softmax over them, and their gradient."""
    views = 2 * pairs
    forward = linear(views, hidden, views) + one_pass(views * views)
    return forward.times(1 + BACKWARD) + Work(exponentials=views * views)


def augmenters(pairs: int, hidden: int, inner: Sequence[int]) -> Work:
    """Both augmenters, forward and backward."""
    sizes = [hidden, *inner, hidden]
    forward = Work()
    for before, after in pairwise(sizes):
        forward += linear(pairs, before, after) + one_pass(pairs * after)
    return forward.times(2 * (1 + BACKWARD))


def adam(parameters: int) -> Work:
    """Weight, gradient and two moments read; weight, two moments and the gradient written."""
    return Work(state_bytes=8.0 * FLOAT_BYTES * parameters)


def pairs_seen(packed: Packed) -> int:
    """Pairs of a slot that holds an item and one that it may look at."""
    real = (packed.segment >= 0)[:, None, :, None]
    return int((visible_keys(packed) & real).sum())


def phase_work(method: Method, config: EncoderConfig, batch: Batch, phase: Phase) -> Work:
    """One phase of a method on a batch, optimizer included."""
    views = batch.views if method.num_views and batch.views is not None else ()
    total = Work()
    if phase.name != "augmenters":
        packs = [batch.clean, *views]
        asked = batch.num_targets + sum(len(view.last) for view in views)
        total += _with_backward(_forward(packs, asked, config))
        items = method.item_vectors.shape[0]
        total += next_item(batch.num_targets, items, config.hidden_size, config.products)
    elif views:
        total += _forward(views, sum(len(view.last) for view in views), config)
    if isinstance(config, MCLRecConfig) and batch.num_pairs:
        total += augmenters(batch.num_pairs, config.hidden_size, config.augmenter_sizes)
        total += contrast(batch.num_pairs, config.hidden_size).times(3)
    trained = (p for part in phase.trains for p in method.parts[part].parameters())
    return total + adam(sum(parameter.numel() for parameter in trained))


def _with_backward(forward: Work) -> Work:
    """A softmax's backward needs no exponential again."""
    return replace(forward.times(1 + BACKWARD), exponentials=forward.exponentials)


def _forward(packs: Sequence[Packed], asked: int, config: EncoderConfig) -> Work:
    slots = sum(int((pack.segment >= 0).sum()) for pack in packs)
    return encoder_forward(slots, asked, sum(map(pairs_seen, packs)), config)


def step_work(method: Method, config: EncoderConfig, batch: Batch) -> Work:
    """All phases of a method on a batch."""
    total = Work()
    for phase in method.phases(0):
        total += phase_work(method, config, batch, phase)
    return total
