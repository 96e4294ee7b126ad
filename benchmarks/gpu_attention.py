"""Three ways for packed rows to attend on a GPU, put in the place of `distrl.nn.attention`'s.

sdpa: the project's own, torch's scaled_dot_product_attention with a mask of every row. flex:
FlexAttention, compiled, which leaves out blocks that no slot may see. varlen: the variable-length
flash kernel over the items alone. The last two know no dropout on attention probabilities and no
hidden keys within a segment, so all are compared without dropout there, and with mask_with=token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import distrl.nn.encoder as encoder
from distrl.contract import Packed

ROW_LENGTH = {"sdpa": 50, "flex": 1024, "varlen": 1024}
"""Slots of a row: a dense mask wants short ones, a sparse kernel blocks of its own size."""


@dataclass(frozen=True)
class Items:
    """Where the items of packed rows lie, for a kernel that knows no rows."""

    slots: Tensor
    """Flat index of each slot that holds an item, in order."""
    offsets: Tensor
    """First item of each segment as it lies in the rows, and the number of items."""
    longest: int


def items_of(packed: Packed) -> Items:
    """The items without padding; a segment's are side by side."""
    real = (packed.segment >= 0).flatten()
    slots = real.nonzero()[:, 0]
    starts = (packed.position.flatten()[slots] == 0).nonzero()[:, 0]
    offsets = torch.cat([starts, starts.new_tensor([len(slots)])]).to(torch.int32)
    return Items(slots, offsets, int(offsets.diff().max()))


def sees(packed: Packed) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's predicate: itself and older slots of its own segment."""

    def predicate(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (packed.segment[row, query] == packed.segment[row, key]) & (query >= key)

    return predicate


def blocks(packed: Packed) -> Any:
    """FlexAttention's mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = packed.segment.shape
    device = packed.segment.device
    return create_block_mask(sees(packed), rows, None, length, length, device=device)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, visible: Any, *, dropout: float) -> Tensor:
    """In the place of `attend`."""
    assert dropout == 0.0, "FlexAttention knows no dropout"
    return _compiled_flex()(query, key, value, block_mask=visible)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""From items (T H E) of query, key and value, offsets and the longest segment to mixed values."""


def flash(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Torch's own variable-length kernel; each item sees itself and what lies before it."""
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(mixed, Tensor)
    return mixed


def varlen(kernel: Kernel) -> Callable[..., Tensor]:
    """In the place of `attend`: gathers items, lets a kernel mix them, puts them back."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, visible: Items, *, dropout: float
    ) -> Tensor:
        assert dropout == 0.0, "the variable-length kernel knows no dropout"
        R, H, L, E = query.shape
        flat = [t.transpose(1, 2).reshape(R * L, H, E)[visible.slots] for t in (query, key, value)]
        mixed = kernel(flat[0], flat[1], flat[2], visible.offsets, visible.longest)
        rows = mixed.new_zeros(R * L, H, E).index_copy(0, visible.slots, mixed)
        return rows.view(R, L, H, E).transpose(1, 2)

    return attend


@contextmanager
def attention(kind: str, kernel: Kernel = flash) -> Iterator[None]:
    """Within it the encoder attends in one of the three ways."""
    own = encoder.visible_keys, encoder.attend
    if kind == "flex":
        encoder.visible_keys, encoder.attend = blocks, flex
    elif kind == "varlen":
        encoder.visible_keys, encoder.attend = items_of, varlen(kernel)
    try:
        yield
    finally:
        encoder.visible_keys, encoder.attend = own
