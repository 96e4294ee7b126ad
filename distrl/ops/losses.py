"""Losses as pure functions. Dimensions: T targets, B sequences, N = 2B views, D hidden, V items.

No function here knows of ranks, devices or configs. Callers that want negatives from other workers
gather before calling, so a loss means the same thing on one worker and on sixty-four.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}
"""Logits alive at once in `next_item_loss`, by device: on a CPU they stay in its cache, on a GPU
they are what fills it with work."""

MIN_CHUNK_ROWS = 32
"""Targets that share one reading of the table, however large the catalog is."""


def next_item_loss(
    states: Float[Tensor, "T D"],
    table: Float[Tensor, "V D"],
    targets: Int64[Tensor, " T"],
    *,
    products: Literal["fp32", "bf16"] = "fp32",
    chunk_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """Full-softmax cross entropy of the next item, never holding targets x items at once.

    Logits are made chunk by chunk and turned into gradients in the same pass, so the backward needs
    neither the logits nor the table again. First-order gradients only.

    Source: MCLRec Eq. 3 (doi:10.1145/3539618.3591727), read as the plain cross entropy on logits
        that the authors' code takes; the paper's formula, taken literally, is a double softmax.

    Args:
        states: One encoder state a target.
        table: One row an item id, PAD's row 0 included: the authors' code keeps it as a class.
        targets: Rows of `table`.
        products: Type of the logits, the probabilities and the factors of all three products. Sums
            over a product's terms, over targets and over items are float32 in any case. "bf16" is
            off by about .003 of the gradient's norm, and faster where the processor has it.
        chunk_bytes: Upper bound on the logits that are alive at once, but at least MIN_CHUNK_ROWS
            rows of them; None takes the device's CHUNK_BYTES.

    Returns:
        Mean over targets, in nats; zero, with a gradient of zero, where there are none.
    """
    dtype = torch.bfloat16
    if products == "fp32":
        dtype = torch.promote_types(torch.promote_types(states.dtype, table.dtype), torch.float32)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(states.device.type, CHUNK_BYTES["cuda"])
    rows = max(MIN_CHUNK_ROWS, chunk_bytes // (dtype.itemsize * table.shape[0]))
    return _NextItemLoss.apply(states, table, targets, rows, dtype)  # pyright: ignore[reportReturnType]


class _NextItemLoss(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of targets."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        states: Tensor,
        table: Tensor,
        targets: Tensor,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        num_targets = states.shape[0]
        exact = torch.promote_types(dtype, torch.float32)
        states_TD, table_VD = states.detach().to(dtype), table.detach().to(dtype)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_TD = torch.empty_like(states_TD, dtype=exact) if wants_grad else None
        grad_VD = torch.zeros_like(table_VD, dtype=exact) if wants_grad else None
        total = states.new_zeros((), dtype=exact)
        size = (min(rows, num_targets), table.shape[0])
        scratch = states_TD.new_empty(size), states_TD.new_empty(size)
        for start in range(0, num_targets, rows):
            chunk_CD = states_TD[start : start + rows]
            at = torch.arange(len(chunk_CD), device=targets.device), targets[start : start + rows]
            logits_CV = torch.mm(chunk_CD, table_VD.T, out=scratch[0][: len(chunk_CD)])
            probs_CV = torch.softmax(logits_CV, dim=1, out=scratch[1][: len(chunk_CD)])
            total -= _log_of_target(logits_CV, probs_CV[at], at).sum()
            if grad_TD is not None and grad_VD is not None:
                # A scatter of one number a row costs two passes over the chunk in bf16.
                probs_CV[at] -= 1.0
                _add_product(grad_TD[start : start + rows].zero_(), probs_CV, table_VD)
                _add_product(grad_VD, probs_CV.T, chunk_CD)
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
            None,
        )


def _log_of_target(logits_CV: Tensor, prob_C: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """Logarithm of each target's probability, from the probability where that did not underflow.

    The softmax has been paid for; a maximum or a logsumexp would read all logits once more.
    """
    log_C = prob_C.to(torch.promote_types(prob_C.dtype, torch.float32)).log()
    lost_C = prob_C < torch.finfo(prob_C.dtype).tiny
    if lost_C.any():
        logits = logits_CV[lost_C].to(log_C.dtype)
        log_C[lost_C] = logits_CV[at][lost_C].to(log_C.dtype) - logits.logsumexp(dim=1)
    return log_C


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right in the type of `total`, which may be wider than theirs."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class PairContrast(NamedTuple):
    """The two things one similarity matrix of a pair of views yields."""

    info_nce: Float[Tensor, ""]
    margin: Float[Tensor, ""]


def info_nce(
    first: Float[Tensor, "B D"],
    second: Float[Tensor, "B D"],
    *,
    temperature: float,
    alike: Bool[Tensor, "B B"] | None = None,
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
        alike: Pairs of sequences that are not each other's negatives, symmetric; the diagonal
            plays no part. None takes all others as negatives, as the papers do.

    Returns:
        Mean over the 2B rows, in nats; an anchor without negatives adds zero.

    Raises:
        ValueError: If B is 1, which leaves no negatives and makes the loss a constant zero.
    """
    return _info_nce(*_similarities(first, second, temperature, alike))


def one_way_info_nce(
    anchor: Float[Tensor, "B D"],
    positive: Float[Tensor, "B D"],
    *,
    temperature: float,
    alike: Bool[Tensor, "B B"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of anchors against positives alone: B - 1 negatives, which are others' positives.

    Source: SRA-CL's inter-user loss as the paper has it (arXiv:2503.04162); its code takes
        `info_nce`. Similarity is the dot product.

    Args:
        anchor: Any scale.
        positive: Row-aligned with `anchor`.
        temperature: Divides every similarity; positive. The paper has none.
        alike: See `info_nce`.

    Returns:
        Mean over the B anchors, in nats; an anchor without negatives adds zero.

    Raises:
        ValueError: If B is 1.
    """
    if len(anchor) < 2:
        raise ValueError(f"a contrast needs at least 2 sequences, got {len(anchor)}")
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    logits_BB = (anchor.to(dtype) @ positive.to(dtype).T) / temperature
    if alike is not None:
        others_BB = alike.clone().fill_diagonal_(False)
        logits_BB = logits_BB.masked_fill(others_BB, float("-inf"))
    return F.cross_entropy(logits_BB, torch.arange(len(anchor), device=anchor.device))


def pair_contrast(
    first: Float[Tensor, "B D"],
    second: Float[Tensor, "B D"],
    *,
    temperature: float,
    anchor: Literal["per_anchor", "global"] = "per_anchor",
    alike: Bool[Tensor, "B B"] | None = None,
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
        alike: See `info_nce`.

    Returns:
        Both terms; the regularizer is a mean over the anchors that have negatives.

    Raises:
        ValueError: If B is 1.
    """
    logits_NN, partner_N = _similarities(first, second, temperature, alike)
    positive_N = logits_NN.gather(1, partner_N[:, None]).squeeze(1)
    negative_NN = logits_NN.scatter(1, partner_N[:, None], float("-inf"))
    hardest_N = negative_NN.amax(dim=1)
    if alike is None:
        mean_N = _mean_negatives(first, second, positive_N, temperature)
    else:
        is_negative_NN = ~negative_NN.isneginf()
        opposed_N = is_negative_NN.any(dim=1)
        count_N = is_negative_NN.sum(dim=1)[opposed_N]
        mean_N = negative_NN.masked_fill(~is_negative_NN, 0.0).sum(dim=1)[opposed_N] / count_N
        positive_N, hardest_N = positive_N[opposed_N], hardest_N[opposed_N]
    nce = _info_nce(logits_NN, partner_N)
    if not len(positive_N):
        return PairContrast(nce, nce * 0.0)
    margin = _margin_per_anchor if anchor == "per_anchor" else _margin_global
    return PairContrast(nce, margin(positive_N, hardest_N, mean_N))


def _similarities(
    first: Tensor, second: Tensor, temperature: float, alike: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Similarities of the 2B rows, -inf where neither positive nor negative; rows of positives."""
    num_sequences = first.shape[0]
    if num_sequences < 2:
        raise ValueError(f"a contrast needs at least 2 sequences, got {num_sequences}")
    views_ND = _views(first, second)
    # In place: the product needs none of its own values for its backward.
    logits_NN = (views_ND @ views_ND.T).div_(temperature).fill_diagonal_(float("-inf"))
    partner_N = torch.arange(2 * num_sequences, device=first.device).roll(num_sequences)
    if alike is not None:
        others_BB = alike.clone().fill_diagonal_(False)
        logits_NN = logits_NN.masked_fill(others_BB.repeat(2, 2), float("-inf"))
    return logits_NN, partner_N


def _views(first: Tensor, second: Tensor) -> Tensor:
    views_ND = torch.cat([first, second])
    return views_ND.to(torch.promote_types(views_ND.dtype, torch.float32))


def _info_nce(logits_NN: Tensor, partner_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NN, partner_N)


def _mean_negatives(
    first: Tensor, second: Tensor, positive_N: Tensor, temperature: float
) -> Tensor:
    """Mean negative of each anchor, by way of the sum of all views: no N x N matrix."""
    views_ND = _views(first, second)
    others_ND = views_ND.sum(dim=0) - views_ND
    total_N = (views_ND * others_ND).sum(dim=1) / temperature
    return (total_N - positive_N) / (len(views_ND) - 2)


def _margin_per_anchor(positive_N: Tensor, hardest_N: Tensor, mean_N: Tensor) -> Tensor:
    return (2 * F.relu(positive_N - hardest_N) + hardest_N - mean_N).mean()


def _margin_global(positive_N: Tensor, hardest_N: Tensor, mean_N: Tensor) -> Tensor:
    worst_positive, hardest = positive_N.amin(), hardest_N.amax()
    low, high = torch.minimum(worst_positive, hardest), torch.maximum(worst_positive, hardest)
    # No negative exceeds `high`, so the mean of relu(high - n) is high minus the mean of n.
    return F.relu(positive_N - low).mean() + high - mean_N.mean()


def ranking_triplet(
    anchor: Float[Tensor, "B D"], near: Float[Tensor, "B D"], far: Float[Tensor, "B D"]
) -> Float[Tensor, " B"]:
    """How much less an anchor is like what should be near it than like what may be far.

    -log [exp(a.n) / (exp(a.n) + exp(a.f))] of each row, with the dot product as similarity: log 2
    where both are alike, without margin, temperature or normalization. Gradients reach all three.

    Source: the code of TCLARec (doi:10.1145/3726302.3730101), whose equation numbers are not
        public. It exponentiates, overflows and replaces a zero denominator by 1e-5; a log-sigmoid
        needs neither.

    Returns:
        One value a row, in nats.
    """
    return F.softplus((anchor * far).sum(dim=1) - (anchor * near).sum(dim=1))
