"""The augmenters' gradient through a step of the encoder, against plain autograd and slopes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distrl.contract import Catalog
from distrl.methods import build, parse_method
from distrl.methods.mclrec import AUGMENTERS
from distrl.ops.losses import pair_contrast
from tests.packed import batch_of, pack_rows

SEQUENCES = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 2]]
VIEWS = ([[1, 2], [0, 5], [6], [8, 7, 9, 2]], [[1, 0, 3], [5], [6], [9, 2]])
SHARES = {"target": 1.0, "pair": 1.0}
LR, WEIGHT, MARGIN = 0.3, 0.4, 0.1


def batch():
    plain = batch_of(SEQUENCES, [4, 6, 7, 1], VIEWS, 6)
    return replace(plain, pair_sample=torch.arange(4), pair_target=plain.targets)


def make(**settings):
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "inner_size": 16, "num_heads": 2, "dropout": 0.0}
    weights = {"model_weight": WEIGHT, "margin_scale": MARGIN, "meta_lr": LR}
    config = parse_method(
        {"name": "mclrec", "attention_dropout": 0.0, **sizes, **weights, **settings}
    )
    method = build(config, Catalog(num_items=10, max_len=6)).double()
    for parameter in method.encoder.parameters():
        parameter.data.mul_(3)
    return method.requires_grad_(False)


def gradient(method):
    method.augmenters.requires_grad_(True)
    loss = method(batch(), AUGMENTERS).total(SHARES)
    return loss, torch.autograd.grad(loss, list(method.augmenters.parameters()))


def learned_loss(method, h1, h2):
    z1, z2 = method.augmenters[0](h1), method.augmenters[1](h2)
    pairs = [pair_contrast(*p, temperature=1.0) for p in ((z1, z2), (h1, z2), (h2, z1))]
    return sum(p.info_nce + MARGIN * p.margin for p in pairs)


def restated(method, next_item_weight):
    """Everything in one graph, with torch's own cross entropy on whole logits."""
    encoder, data = method.encoder, batch()
    weights = {n: p.detach().requires_grad_() for n, p in encoder.named_parameters()}

    def run(weights, packed):
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(encoder, weights, (packed, packed.last))

    def next_item(weights):
        logits = run(weights, data.clean) @ weights["item_table.weight"][:11].T
        return F.cross_entropy(logits, data.targets)

    before = [run(weights, pack_rows(view, 6)) for view in VIEWS]
    inner = next_item(weights) + WEIGHT * learned_loss(method, *before)
    steps = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    after = {n: w - LR * s for (n, w), s in zip(weights.items(), steps, strict=True)}
    outer = learned_loss(method, *(run(after, pack_rows(view, 6)) for view in VIEWS))
    outer = outer + next_item_weight * next_item(after)
    return outer, torch.autograd.grad(outer, list(method.augmenters.parameters()))


@pytest.mark.parametrize("next_item_weight", [0.0, 2.0])
def test_it_is_the_gradient_of_the_whole_unrolled_graph(next_item_weight):
    method = make(meta="second_order", meta_next_item_weight=next_item_weight)
    loss, found = gradient(method)
    expected_loss, expected = restated(method, next_item_weight)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_it_is_the_slope_of_the_loss_after_the_step():
    method = make(meta="second_order", meta_next_item_weight=2.0)
    _, found = gradient(method)
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in method.augmenters.parameters()]
    ends = []
    for sign in (1, -1):
        moved = make(meta="second_order", meta_next_item_weight=2.0)
        for parameter, way in zip(moved.augmenters.parameters(), direction, strict=True):
            parameter.data.add_(way, alpha=sign * 1e-5)
        ends.append(moved(batch(), AUGMENTERS).total(SHARES).item())
    slope = sum((a * b).sum().item() for a, b in zip(found, direction, strict=True))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_the_first_order_step_does_not_see_the_encoders_answer():
    _, first = gradient(make())
    _, second = gradient(make(meta="second_order", meta_lr=1e-9))
    _, seen = gradient(make(meta="second_order", meta_next_item_weight=2.0))
    for a, b in zip(first, second, strict=True):
        # The fused attention of the first-order pass approximates its exponentials.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(first, seen, strict=True))


def test_no_encoder_weight_moves_or_gets_a_gradient():
    method = make(meta="second_order")
    before = [p.clone() for p in method.encoder.parameters()]
    method.requires_grad_(False)
    method.augmenters.requires_grad_(True)
    method(batch(), AUGMENTERS).total(SHARES).backward()
    assert all(p.grad is None for p in method.encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, method.encoder.parameters(), strict=True))
