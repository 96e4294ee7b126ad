"""Each loss against the paper, restated slowly in Python floats."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distrl.ops.losses import info_nce, next_item_loss, pair_contrast


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def scores(first, second, temperature, alike=()):
    """For each anchor: its positive's score, and its negatives' scores."""
    views = [row.tolist() for row in torch.cat([first, second])]
    half = len(first)
    for i, anchor in enumerate(views):
        partner = (i + half) % len(views)
        negatives = [
            dot(anchor, v) / temperature
            for j, v in enumerate(views)
            if j not in (i, partner) and {i % half, j % half} not in alike
        ]
        yield dot(anchor, views[partner]) / temperature, negatives


def info_nce_by_hand(first, second, temperature, alike=()):
    """MCLRec Eq. 8 averaged over anchors."""
    losses = [
        math.log(math.fsum(math.exp(s) for s in [positive, *negatives])) - positive
        for positive, negatives in scores(first, second, temperature, alike)
    ]
    return math.fsum(losses) / len(losses)


def relu(x):
    return max(x, 0.0)


def margin_by_hand(first, second, temperature, anchor, alike=()):
    """MCLRec Eqs. 11-13 in their relu form, with bounds per anchor or over the batch."""
    rows = [(p, n) for p, n in scores(first, second, temperature, alike) if n]
    if anchor == "global":
        worst, hardest = min(p for p, _ in rows), max(max(n) for _, n in rows)
        bounds = [(min(worst, hardest), max(worst, hardest))] * len(rows)
    else:
        bounds = [(min(p, max(n)), max(p, max(n))) for p, n in rows]
    pull = math.fsum(relu(p - low) for (p, _), (low, _) in zip(rows, bounds, strict=True))
    push = math.fsum(
        math.fsum(relu(high - s) for s in n) / len(n)
        for (_, n), (_, high) in zip(rows, bounds, strict=True)
    )
    return (pull + push) / len(rows)


@pytest.mark.parametrize("num_sequences", [2, 3, 17])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_info_nce_is_eq_8_averaged_over_anchors(num_sequences, temperature):
    first, second = torch.randn(2, num_sequences, 8, dtype=torch.float64)
    loss = info_nce(first, second, temperature=temperature)
    assert loss.item() == pytest.approx(info_nce_by_hand(first, second, temperature), rel=1e-12)


@pytest.mark.parametrize("anchor", ["per_anchor", "global"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_closed_form_of_the_regularizer_is_its_relu_form(anchor, scale):
    first, second = scale * torch.randn(2, 9, 6, dtype=torch.float64)
    both = pair_contrast(first, second, temperature=0.5, anchor=anchor)
    assert both.margin.item() == pytest.approx(
        margin_by_hand(first, second, 0.5, anchor), rel=1e-12
    )
    assert both.info_nce.item() == pytest.approx(info_nce_by_hand(first, second, 0.5), rel=1e-12)


def as_mask(alike, num_sequences):
    mask = torch.zeros((num_sequences, num_sequences), dtype=torch.bool)
    for i, j in (sorted(pair) for pair in alike):
        mask[i, j] = mask[j, i] = True
    return mask


@pytest.mark.parametrize("anchor", ["per_anchor", "global"])
@pytest.mark.parametrize(
    "alike",
    [({0, 3}, {1, 2}, {1, 4}), tuple({0, other} for other in range(1, 5))],
    ids=["some pairs", "an anchor with no negative at all"],
)
def test_sequences_that_are_alike_are_no_negatives_of_each_other(anchor, alike):
    first, second = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = as_mask(alike, 5)
    both = pair_contrast(first, second, temperature=0.5, anchor=anchor, alike=mask)
    assert both.info_nce.item() == pytest.approx(
        info_nce_by_hand(first, second, 0.5, alike), rel=1e-12
    )
    assert both.margin.item() == pytest.approx(
        margin_by_hand(first, second, 0.5, anchor, alike), rel=1e-12
    )
    alone = info_nce(first, second, temperature=0.5, alike=mask)
    assert alone.item() == pytest.approx(both.info_nce.item(), rel=1e-12)


def test_a_mask_of_nobody_changes_nothing_and_its_diagonal_plays_no_part():
    first, second = torch.randn(2, 5, 6, dtype=torch.float64)
    plain = pair_contrast(first, second, temperature=0.5)
    for mask in (as_mask((), 5), torch.eye(5, dtype=torch.bool)):
        masked = pair_contrast(first, second, temperature=0.5, alike=mask)
        torch.testing.assert_close(torch.stack(masked), torch.stack(plain), rtol=1e-12, atol=0)


def test_a_batch_of_sequences_that_are_all_alike_has_no_loss():
    first, second = torch.randn(2, 4, 6, dtype=torch.float64).requires_grad_()
    mask = torch.ones((4, 4), dtype=torch.bool)
    both = pair_contrast(first, second, temperature=1.0, alike=mask)
    assert both.info_nce.item() == 0.0
    assert both.margin.item() == 0.0
    (gradient,) = torch.autograd.grad(both.info_nce + both.margin, first)
    assert not gradient.any()


def test_the_closed_form_has_the_gradient_of_the_relu_form():
    first, second = torch.randn(2, 7, 5, dtype=torch.float64)
    first.requires_grad_()
    (ours,) = torch.autograd.grad(pair_contrast(first, second, temperature=1.0).margin, first)
    views = torch.cat([first, second])
    logits = views @ views.T
    partner = torch.arange(14).roll(7)
    is_negative = ~(torch.eye(14, dtype=torch.bool) | torch.eye(14, dtype=torch.bool)[partner])
    positive = logits[torch.arange(14), partner]
    negatives = logits[is_negative].view(14, 12)
    low = torch.minimum(positive, negatives.amax(1))
    high = torch.maximum(positive, negatives.amax(1))
    relu_form = F.relu(positive - low).mean() + F.relu(high[:, None] - negatives).mean()
    (theirs,) = torch.autograd.grad(relu_form, first)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_view_order_and_batch_order_do_not_matter():
    first, second = torch.randn(2, 6, 4, dtype=torch.float64)
    order = torch.randperm(6)
    here = pair_contrast(first, second, temperature=1.0)
    there = pair_contrast(second[order], first[order], temperature=1.0)
    torch.testing.assert_close(here, there)


@pytest.mark.parametrize("loss", [info_nce, pair_contrast])
def test_a_batch_without_negatives_is_refused(loss):
    with pytest.raises(ValueError, match="at least 2 sequences"):
        loss(torch.ones(1, 4), torch.ones(1, 4), temperature=1.0)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 2, 2**20])
def test_the_next_item_loss_is_torchs_cross_entropy_in_value_and_gradient(chunk_bytes):
    states = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 10, 3, 3, 7])
    ours = next_item_loss(states, table, targets, chunk_bytes=chunk_bytes)
    theirs = F.cross_entropy(states @ table.T, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (states, table)),
        torch.autograd.grad(3 * theirs, (states, table)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bf16_products_change_the_loss_and_its_gradients_by_less_than_their_rounding():
    states, table = torch.randn(300, 64), 0.3 * torch.randn(900, 64)
    targets = torch.randint(1, 900, (300,))
    found = {}
    for products in ("fp32", "bf16"):
        leaves = states.clone().requires_grad_(), table.clone().requires_grad_()
        loss = next_item_loss(*leaves, targets, products=products, chunk_bytes=100_000)
        loss.backward()
        assert leaves[0].grad.dtype == torch.float32
        found[products] = loss.item(), *(leaf.grad for leaf in leaves)
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], rel=1e-3)
    for exact, rounded in zip(found["fp32"][1:], found["bf16"][1:], strict=True):
        assert 0 < (rounded - exact).norm() / exact.norm() < 2**-7


@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_a_target_whose_probability_underflows_still_has_its_loss_and_gradient(products):
    table = torch.tensor([[0.0], [16.0], [1.0]], requires_grad=True)
    states = torch.tensor([[16.0], [0.0]], requires_grad=True)
    loss = next_item_loss(states, table, torch.tensor([0, 2]), products=products)
    loss.backward()
    # 256 nats for the first, log 3 for the second; e**-256 is zero in float32 and bfloat16.
    assert loss.item() == pytest.approx((256 + np.log(3)) / 2, rel=3e-3)
    assert table.grad[:, 0].tolist() == [-8.0, 8.0, 0.0]
    assert states.grad[0].item() == 8.0


def test_no_targets_are_a_loss_and_a_gradient_of_zero():
    states = torch.zeros(0, 3, requires_grad=True)
    table = torch.randn(4, 3, requires_grad=True)
    loss = next_item_loss(states, table, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert table.grad is not None
    assert table.grad.abs().max() == 0
