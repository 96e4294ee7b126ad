"""Causal self-attention within the segments of packed rows. Dimensions: R rows, L slots, H heads.

One function hides how it is computed; a variable-length kernel for GPUs belongs here too.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from distrl.contract import Packed
from distrl.nn.dropout import drop
from distrl.schema import PAD_ID


def visible_keys(packed: Packed, *, causal: bool = True) -> Bool[Tensor, "R 1 L L"]:
    """Which slot (last axis) each slot may look at: itself and older ones of its own segment.

    Newer ones too unless `causal`.

    Slots that hold PAD, whether padding or hidden by the mask augmentation, are nobody's key, as in
    the authors' code. A slot without any visible key would make the softmax NaN, so it sees itself;
    no other state depends on such a slot, because it is nobody's key in any layer.
    """
    segment, length = packed.segment, packed.segment.shape[1]
    same_RLL = segment[:, :, None] == segment[:, None, :]
    visible_RLL = same_RLL & (packed.items != PAD_ID)[:, None, :]
    if causal:
        visible_RLL &= torch.ones_like(visible_RLL[0]).tril()
    blind_RL1 = ~visible_RLL.any(dim=2, keepdim=True)
    self_LL = torch.eye(length, dtype=torch.bool, device=segment.device)
    return (visible_RLL | (blind_RL1 & self_LL))[:, None]


def attend(
    query: Float[Tensor, "R H L E"],
    key: Float[Tensor, "R H L E"],
    value: Float[Tensor, "R H L E"],
    visible: Bool[Tensor, "R 1 L L"],
    *,
    dropout: float,
) -> Float[Tensor, "R H L E"]:
    """Scaled dot-product attention; `dropout` falls on the attention probabilities.

    On a CPU, torch's own function has no fused kernel once there is dropout, and draws it slowly.
    """
    if dropout == 0.0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout
        )
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    share = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return drop(share, dropout, training=True) @ value
