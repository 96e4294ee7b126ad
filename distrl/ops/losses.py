"""Losses as pure functions. Dimensions: T targets, B sequences, N = 2B views, D hidden, V items.

No function here knows of ranks, devices or configs. Callers that want negatives from other workers
gather before calling, so a loss means the same thing on one worker and on sixty-four.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Logits alive at once in `next_item_loss`: small enough to stay near the processor's cache."""


def next_item_loss(
    states: Float[Tensor, "T D"],
    table: Float[Tensor, "V D"],
    targets: Int64[Tensor, " T"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Full-softmax cross entropy of the next item, never holding targets x items at once.

    Logits are made chunk by chunk in float32 or wider and turned into gradients in the same pass,
    so the backward needs neither the logits nor the table again. First-order gradients only.

    Source: MCLRec Eq. 3 (doi:10.1145/3539618.3591727), read as the plain cross entropy on logits
        that the authors' code takes; the paper's formula, taken literally, is a double softmax.

    Args:
        states: One encoder state a target.
        table: One row an item id, PAD's row 0 included: the authors' code keeps it as a class.
        targets: Rows of `table`.
        chunk_bytes: Upper bound on the float32 logits that are alive at once, at least one row.

    Returns:
        Mean over targets, in nats; zero, with a gradient of zero, where there are none.
    """
    rows = max(1, chunk_bytes // (4 * table.shape[0]))
    return _NextItemLoss.apply(states, table, targets, rows)  # pyright: ignore[reportReturnType]


class _NextItemLoss(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of targets."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, rows: int) -> Tensor:  # noqa: ANN401
        num_targets = states.shape[0]
        dtype = torch.promote_types(states.dtype, torch.float32)
        states_TD, table_VD = states.detach().to(dtype), table.detach().to(dtype)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_TD = torch.empty_like(states_TD) if wants_grad else None
        grad_VD = torch.zeros_like(table_VD) if wants_grad else None
        total = states_TD.new_zeros(())
        for start in range(0, num_targets, rows):
            chunk_CD = states_TD[start : start + rows]
            target_C1 = targets[start : start + rows, None]
            logits_CV = chunk_CD @ table_VD.T
            norm_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            total += (norm_C1 - logits_CV.gather(1, target_C1)).sum()
            if grad_TD is not None and grad_VD is not None:
                probs_CV = logits_CV.sub_(norm_C1).exp_()
                probs_CV.scatter_add_(1, target_C1, -torch.ones_like(norm_C1))
                torch.mm(probs_CV, table_VD, out=grad_TD[start : start + rows])
                grad_VD.addmm_(probs_CV.T, chunk_CD)
        scale = 1.0 / max(num_targets, 1)
        if grad_TD is not None and grad_VD is not None:
            ctx.save_for_backward(
                grad_TD.mul_(scale).to(states.dtype), grad_VD.mul_(scale).to(table.dtype)
            )
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        grad_TD, grad_VD = ctx.saved_tensors
        return (
            grad_TD * grads[0].to(grad_TD.dtype),
            grad_VD * grads[0].to(grad_VD.dtype),
            None,
            None,
        )


class PairContrast(NamedTuple):
    """The two things one similarity matrix of a pair of views yields."""

    info_nce: Float[Tensor, ""]
    margin: Float[Tensor, ""]


def info_nce(
    first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], *, temperature: float
) -> Float[Tensor, ""]:
    """In-batch InfoNCE over two views of the same B sequences.

    Row i of `first` and row i of `second` are each other's positive; the other 2B - 2 rows of both
    views are negatives. Similarity is the dot product: normalize first for cosine.

    Source: MCLRec Eq. 8 (doi:10.1145/3539618.3591727). The paper adds the two directions; we
        average over all 2B anchors, as the authors' released code does, so our value is half the
        paper's.

    Args:
        first: One view, any scale.
        second: The other view, row-aligned with `first`.
        temperature: Divides every similarity; positive.

    Returns:
        Mean over the 2B rows, in nats.

    Raises:
        ValueError: If B is 1, which leaves no negatives and makes the loss a constant zero.
    """
    return _info_nce(*_similarities(first, second, temperature))


def pair_contrast(
    first: Float[Tensor, "B D"],
    second: Float[Tensor, "B D"],
    *,
    temperature: float,
    anchor: Literal["per_anchor", "global"] = "per_anchor",
) -> PairContrast:
    """InfoNCE and MCLRec's contrastive regularizer from one similarity matrix.

    The regularizer keeps positives from outrunning the hardest negatives, against InfoNCE. With
    p_i the positive of anchor i, n_ij its negatives, m_i = max_j n_ij and low and high the lesser
    and the greater of the two bounds: mean_i relu(p_i - low) + mean_ij relu(high - n_ij).

    Source: MCLRec Eqs. 11-13. "global" is the paper's: low = min(min_i p_i, max n), high =
        max(min_i p_i, max n) over the whole batch. "per_anchor" is the authors' code: low_i =
        min(p_i, m_i), high_i = max(p_i, m_i), whose closed form is
        mean_i [2 relu(p_i - m_i) + m_i - mean_j n_ij].

    Args:
        first: One view, any scale.
        second: The other view, row-aligned with `first`.
        temperature: Divides every similarity, in both terms; positive.
        anchor: Bounds of the regularizer, see above.

    Returns:
        Both terms, means over the 2B rows.

    Raises:
        ValueError: If B is 1.
    """
    logits_NN, partner_N = _similarities(first, second, temperature)
    margin = _margin_per_anchor if anchor == "per_anchor" else _margin_global
    return PairContrast(_info_nce(logits_NN, partner_N), margin(logits_NN, partner_N))


def _similarities(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """All similarities of the 2B rows with the diagonal at -inf, and each row's positive."""
    num_sequences = first.shape[0]
    if num_sequences < 2:
        raise ValueError(f"a contrast needs at least 2 sequences, got {num_sequences}")
    views_ND = torch.cat([first, second])
    views_ND = views_ND.to(torch.promote_types(views_ND.dtype, torch.float32))
    logits_NN = views_ND @ views_ND.T / temperature
    logits_NN = logits_NN.masked_fill(
        torch.eye(2 * num_sequences, dtype=torch.bool, device=first.device), float("-inf")
    )
    partner_N = torch.arange(2 * num_sequences, device=first.device).roll(num_sequences)
    return logits_NN, partner_N


def _info_nce(logits_NN: Tensor, partner_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NN, partner_N)


def _split(logits_NN: Tensor, partner_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positives, negatives with every other entry at -inf, and the mean negative of each anchor."""
    num_views = logits_NN.shape[0]
    positive_N = logits_NN.gather(1, partner_N[:, None]).squeeze(1)
    negative_NN = logits_NN.scatter(1, partner_N[:, None], float("-inf"))
    total_N = negative_NN.masked_fill(negative_NN.isneginf(), 0.0).sum(dim=1)
    return positive_N, negative_NN, total_N / (num_views - 2)


def _margin_per_anchor(logits_NN: Tensor, partner_N: Tensor) -> Tensor:
    positive_N, negative_NN, mean_N = _split(logits_NN, partner_N)
    hardest_N = negative_NN.amax(dim=1)
    return (2 * F.relu(positive_N - hardest_N) + hardest_N - mean_N).mean()


def _margin_global(logits_NN: Tensor, partner_N: Tensor) -> Tensor:
    positive_N, negative_NN, mean_N = _split(logits_NN, partner_N)
    worst_positive, hardest = positive_N.amin(), negative_NN.amax()
    low, high = torch.minimum(worst_positive, hardest), torch.maximum(worst_positive, hardest)
    # No negative exceeds `high`, so the mean of relu(high - n) is high minus the mean of n.
    return F.relu(positive_N - low).mean() + high - mean_N.mean()
