from fractions import Fraction

import pytest
import torch

from distrl.errors import DivergedError
from distrl.ops import ranking
from distrl.ops.ranking import (
    ItemGrid,
    sampled_ranks,
    seen_before_target,
    target_ranks,
    top_items,
)

NUM_USERS, NUM_ITEMS, WIDTH = 23, 40, 5


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


@pytest.fixture
def tied(generator):
    """Whole-number vectors so small that many scores are equal, and targets and seen pairs."""
    states = torch.randint(-2, 3, (NUM_USERS, WIDTH), generator=generator).float()
    vectors = torch.randint(-2, 3, (NUM_ITEMS + 1, WIDTH), generator=generator).float()
    vectors[0] = 100.0  # PAD: would win every ranking
    targets = torch.randint(1, NUM_ITEMS + 1, (NUM_USERS,), generator=generator)
    pairs = torch.rand(NUM_USERS, NUM_ITEMS + 1, generator=generator) < 0.2
    pairs[:, 0] = False
    pairs[torch.arange(NUM_USERS), targets] = False
    return states, vectors, targets, pairs.nonzero().T


def ranking_by_hand(state, vectors, without=()):
    """Item ids, best first: scores in fractions, ties by id; slow, and too plain to be wrong."""

    def score(item):
        return sum(
            Fraction(s) * Fraction(v)
            for s, v in zip(state.tolist(), vectors[item].tolist(), strict=True)
        )

    items = [item for item in range(1, len(vectors)) if item not in without]
    return sorted(items, key=lambda item: (-score(item), item))


def test_ranks_by_hand():
    # Scores of items 1..4: 3, 5, 3, -1.
    vectors = torch.tensor([[9.0], [3.0], [5.0], [3.0], [-1.0]])
    grid = ItemGrid.of(vectors)
    states = torch.ones(4, 1)

    ranks = target_ranks(states, grid, torch.tensor([1, 2, 3, 4]), item_chunk=2)

    # Item 2 leads; 1 and 3 tie and the lower id goes first.
    assert ranks.tolist() == [2, 1, 3, 4]


@pytest.mark.parametrize("item_chunk", [1, 7, 39, 40, 1000])
def test_ranks_equal_a_slow_restatement_with_ties(tied, item_chunk):
    states, vectors, targets, _ = tied
    ranks = target_ranks(states, ItemGrid.of(vectors), targets, item_chunk=item_chunk)
    expected = [
        ranking_by_hand(state, vectors).index(target) + 1
        for state, target in zip(states, targets.tolist(), strict=True)
    ]
    assert ranks.tolist() == expected


def test_sampled_ranks_by_hand_with_ties_against_the_target():
    # Scores of items 1..6: 3, 5, 3, -1, 3, 8.
    grid = ItemGrid.of(torch.tensor([[9.0], [3.0], [5.0], [3.0], [-1.0], [3.0], [8.0]]))
    targets = torch.tensor([1, 5, 6, 4, 3])
    negatives = torch.tensor(
        [
            [2, 3, 4],  # 5 is more than 3, 3 as much: third
            [1, 3, 4],  # twice as much, though both ids are lower: third
            [1, 2, 3],  # none: first
            [1, 2, 3],  # all: last
            [4, 5, 1],  # twice as much, one id higher and one lower: third
        ]
    )
    assert sampled_ranks(torch.ones(5, 1), grid, targets, negatives).tolist() == [3, 3, 1, 4, 3]
    # A state of another sign turns the order round: of 5, 3 and -1 two are no more than 3.
    assert sampled_ranks(-torch.ones(1, 1), grid, targets[:1], negatives[:1]).tolist() == [3]


@pytest.mark.parametrize("pairs_at_once", [1, 9, 65536])
def test_sampled_ranks_equal_a_slow_restatement_with_ties(
    tied, generator, monkeypatch, pairs_at_once
):
    monkeypatch.setattr(ranking, "PAIRS_AT_ONCE", pairs_at_once)
    states, vectors, targets, _ = tied
    order = torch.rand(NUM_USERS, NUM_ITEMS, generator=generator).argsort(dim=1) + 1
    negatives = torch.stack(
        [row[row != target][:9] for row, target in zip(order, targets, strict=True)]
    )
    scores = vectors @ states.T
    expected = [
        1 + sum(bool(scores[item, user] >= scores[target, user]) for item in negatives[user])
        for user, target in enumerate(targets.tolist())
    ]
    assert sampled_ranks(states, ItemGrid.of(vectors), targets, negatives).tolist() == expected
    tied_with = (scores.T.gather(1, negatives) == scores.T.gather(1, targets[:, None])).any()
    assert tied_with, "no negative ties with a target: the test shows too little"


def test_a_collapsed_model_is_last_among_sampled_candidates():
    grid = ItemGrid.of(torch.full((NUM_ITEMS + 1, 64), 0.1234567))
    states = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    negatives = torch.arange(2, 8).expand(2, 6)
    assert sampled_ranks(states, grid, torch.tensor([1, 40]), negatives).tolist() == [7, 7]


def test_seen_items_before_the_target_equal_a_slow_restatement(tied):
    states, vectors, targets, seen = tied
    grid = ItemGrid.of(vectors)
    kept = target_ranks(states, grid, targets, item_chunk=16)
    masked = kept - seen_before_target(states, grid, targets, seen[0], seen[1])
    expected = [
        ranking_by_hand(states[user], vectors, seen[1][seen[0] == user].tolist()).index(target) + 1
        for user, target in enumerate(targets.tolist())
    ]
    assert masked.tolist() == expected
    assert (masked < kept).any()


@pytest.mark.parametrize("item_chunk", [1, 3, 7, 40, 1000])
@pytest.mark.parametrize("mask", [False, True])
def test_top_items_equal_a_slow_restatement_with_ties(tied, item_chunk, mask):
    states, vectors, _, seen = tied
    chosen = (seen[0], seen[1]) if mask else None
    ids, scores = top_items(states, ItemGrid.of(vectors), 6, item_chunk=item_chunk, seen=chosen)
    for user in range(NUM_USERS):
        without = seen[1][seen[0] == user].tolist() if mask else ()
        expected = ranking_by_hand(states[user], vectors, without)[:6]
        assert ids[user].tolist() == expected
        assert scores[user].tolist() == (vectors[expected] @ states[user]).tolist()


def test_a_user_with_too_few_candidates_gets_padding():
    vectors = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    seen = (torch.tensor([0, 0]), torch.tensor([3, 1]))
    ids, scores = top_items(torch.ones(1, 1), ItemGrid.of(vectors), 3, item_chunk=2, seen=seen)
    assert ids.tolist() == [[2, 0, 0]]
    assert scores.tolist() == [[2.0, float("-inf"), float("-inf")]]


def test_a_collapsed_model_ranks_by_id_and_not_first():
    vectors = torch.full((NUM_ITEMS + 1, 64), 0.1234567)
    states = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 2, 3, 10, 20, 39, 40])
    assert (
        target_ranks(states, ItemGrid.of(vectors), targets, item_chunk=9).tolist()
        == targets.tolist()
    )


@pytest.mark.parametrize("width", [1, 3, 64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_do_not_depend_on_the_order_of_summation(generator, width, dtype):
    vectors = torch.randn(301, width, generator=generator, dtype=dtype)
    grid = ItemGrid.of(vectors)
    states = torch.randn(19, width, generator=generator, dtype=dtype).exp()
    order = torch.randperm(width, generator=generator)
    on_grid, rows = grid.states(states), grid.rows(slice(1, None))

    scores = on_grid @ rows.T

    assert torch.equal(scores, on_grid[:, order] @ rows[:, order].T)
    assert torch.equal(scores, (on_grid[:, None] * rows[None]).flip(-1).sum(-1))
    assert scores.abs().max() < 2**52
    true = grid.true_scores(scores, states)
    exact = states.double() @ vectors[1:].double().T
    # Each factor is rounded at 2 ** -21 of the largest or finer.
    bound = width * states.abs().amax(1, keepdim=True).double() * vectors.abs().max() * 2.0**-20
    assert ((true - exact).abs() <= bound).all()


def test_the_scale_of_a_state_does_not_matter(generator):
    vectors = torch.randn(50, 8, generator=generator)
    states = torch.randn(5, 8, generator=generator)
    targets = torch.tensor([3, 1, 49, 20, 7])
    grid = ItemGrid.of(vectors)
    ranks = target_ranks(states, grid, targets, item_chunk=8)
    assert torch.equal(ranks, target_ranks(states * 2.0**-120, grid, targets, item_chunk=8))


def test_zero_states_rank_by_id():
    vectors = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    ranks = target_ranks(
        torch.zeros(2, 4), ItemGrid.of(vectors), torch.tensor([4, 9]), item_chunk=3
    )
    assert ranks.tolist() == [4, 9]


def test_a_model_that_is_not_finite_is_named():
    vectors = torch.ones(4, 2)
    vectors[2, 1] = float("nan")
    with pytest.raises(DivergedError, match="item vector"):
        ItemGrid.of(vectors)
    with pytest.raises(DivergedError, match="state"):
        target_ranks(
            torch.tensor([[1.0, float("inf")]]),
            ItemGrid.of(torch.ones(4, 2)),
            torch.tensor([1]),
            item_chunk=2,
        )
