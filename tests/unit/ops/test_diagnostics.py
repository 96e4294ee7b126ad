from math import exp, log

import pytest
import torch

from distrl.ops.diagnostics import (
    alignment,
    effective_rank,
    mean_norm,
    uniformity,
    view_diagnostics,
)

AXES = torch.eye(3)


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def test_identical_views_are_aligned():
    views = torch.randn(5, 4)
    assert alignment(views, views).item() == 0.0


def test_alignment_is_the_mean_squared_distance_on_the_sphere():
    # Orthogonal: distance sqrt 2. Opposite: 2. The same direction: 0, whatever the lengths.
    first = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.0, 5.0], [-1.0, 0.0], [0.0, 7.0]])
    assert alignment(first, second).item() == pytest.approx((2 + 4 + 0) / 3, rel=1e-15)


def test_alignment_is_two_minus_twice_the_mean_cosine():
    first, second = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    cosine = torch.cosine_similarity(first, second).mean()
    assert alignment(first, second).item() == pytest.approx(2 - 2 * cosine.item(), rel=1e-12)


def test_one_point_is_the_least_uniform():
    assert uniformity(torch.ones(6, 4)).item() == pytest.approx(0.0, abs=1e-12)


def test_uniformity_is_the_log_of_the_mean_gaussian_potential():
    # The three axes are at squared distance 2 from one another: exp(-2 * 2) for each pair.
    assert uniformity(AXES).item() == pytest.approx(-4.0, rel=1e-12)
    # Of (e1, e1, -e1): one pair at distance 0, two at squared distance 4.
    views = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    assert uniformity(views).item() == pytest.approx(log((1 + 2 * exp(-8)) / 3), rel=1e-12)


def test_identical_views_have_rank_one():
    assert effective_rank(torch.ones(6, 4)).item() == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(torch.zeros(6, 4)).item() == 1.0


def test_views_along_all_axes_alike_have_the_rank_of_their_dimensions():
    assert effective_rank(AXES).item() == pytest.approx(3.0, rel=1e-12)
    assert effective_rank(torch.cat([AXES, -2 * AXES])).item() == pytest.approx(3.0, rel=1e-12)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    # Singular values 3 and 1: shares 3/4 and 1/4.
    views = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    entropy = -(0.75 * log(0.75) + 0.25 * log(0.25))
    assert effective_rank(views).item() == pytest.approx(exp(entropy), rel=1e-12)


def test_a_large_common_mean_counts_as_collapse():
    views = torch.randn(50, 8)
    assert effective_rank(views).item() > 6
    assert effective_rank(views + 1000).item() < 1.2


def test_mean_norm_is_a_mean_of_lengths():
    assert mean_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item() == 3.0


@pytest.mark.parametrize(
    "change", [lambda v: v[torch.randperm(9)], lambda v: v @ rotation(6), lambda v: 7 * v]
)
def test_order_rotation_and_scale_change_nothing(change):
    views = torch.randn(9, 6).double()
    for measure in (uniformity, effective_rank):
        assert measure(change(views)).item() == pytest.approx(measure(views).item(), rel=1e-12)


def test_alignment_ignores_a_common_order_a_common_rotation_and_each_views_length():
    first, second = torch.randn(9, 6).double(), torch.randn(9, 6).double()
    before = alignment(first, second).item()
    order, turned = torch.randperm(9), rotation(6)
    assert alignment(first[order], second[order]).item() == pytest.approx(before, rel=1e-12)
    assert alignment(first @ turned, second @ turned).item() == pytest.approx(before, rel=1e-12)
    assert alignment(3 * first, second / 5).item() == pytest.approx(before, rel=1e-12)


def test_the_diagnostics_of_a_pair_are_means_over_its_two_views():
    first, second = AXES, torch.ones(3, 3)
    found = view_diagnostics(first, second)
    assert found["uniformity"] == pytest.approx((-4.0 + 0.0) / 2, rel=1e-12)
    assert found["effective_rank"] == pytest.approx((3.0 + 1.0) / 2, rel=1e-6)
    assert found["norm"] == pytest.approx((1.0 + 3**0.5) / 2, rel=1e-12)
    assert found["alignment"] == pytest.approx(2 - 2 / 3**0.5, rel=1e-12)
    swapped = view_diagnostics(second, first)
    assert swapped == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize(
    ("measure", "views"),
    [
        (uniformity, torch.ones(1, 4)),
        (effective_rank, torch.ones(0, 4)),
        (mean_norm, torch.ones(0, 4)),
        (lambda views: alignment(views, views), torch.ones(0, 4)),
    ],
)
def test_too_few_views_are_an_error(measure, views):
    with pytest.raises(ValueError, match=r"needs at least \d (view|pair)"):
        measure(views)
