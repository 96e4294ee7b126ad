"""Ranking that does not depend on the order of summation, of the whole catalog or a sample.

Dimensions: U users, V items, D hidden, C items of a chunk, S seen pairs, N negatives a user.

Floating-point sums depend on the shape of the batch they are computed in, so items with equal
vectors would be told apart by noise, and ranks would change with batch size and sharding. Here
states and vectors are rounded to integers of 22 to 24 bits (a float32 has 24), small enough that
every partial sum of a dot product is exact in float64. Items rank by falling score, and equal
scores by rising id; dense ids fall with frequency, so a collapsed model ranks like popularity.
Among sampled candidates the target comes last of equal ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distrl.errors import DivergedError
from distrl.schema import PAD_ID

EXACT_BITS = 52
"""A half more than a sum of this many bits is still exact in float64, which has 53."""

PAIRS_AT_ONCE = 65536


@dataclass(frozen=True, slots=True)
class ItemGrid:
    """Item vectors, read as integers times 2 ** (exponent - bits)."""

    vectors: Float[Tensor, "V1 D"]
    exponent: int
    bits: int
    state_bits: int

    @classmethod
    def of(cls, vectors: Float[Tensor, "V1 D"]) -> "ItemGrid":
        """The grid that spans all items; PAD's row does not count.

        Raises:
            DivergedError: If a vector is not finite.
        """
        hidden_size = vectors.shape[1]
        peak = vectors[PAD_ID + 1 :].abs().amax()
        if not torch.isfinite(peak):
            raise DivergedError("an item vector is NaN or infinite, so no item can be ranked")
        bits = EXACT_BITS - (hidden_size - 1).bit_length()
        exponent = int(torch.frexp(peak.double()).exponent)
        return cls(vectors, exponent, bits - bits // 2, bits // 2)

    @property
    def num_items(self) -> int:
        """V, without PAD."""
        return self.vectors.shape[0] - 1

    def rows(self, index: slice | Int64[Tensor, " C"]) -> Float[Tensor, "C D"]:
        """Vectors of some items as integers held in float64."""
        return (self.vectors[index].double() * 2.0**self._shift).round_()

    def states(self, states: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
        """User states as integers held in float64, each user on a grid of its own.

        A user's ranking does not change with the scale of the user's state.

        Raises:
            DivergedError: If a state is not finite.
        """
        return (states.double() * _power_of_two(self._state_shift(states))).round_()

    def true_scores(
        self, scores: Float[Tensor, "U K"], states: Float[Tensor, "U D"]
    ) -> Float[Tensor, "U K"]:
        """Scores on the grid in the method's own units; `states` as the method gave them."""
        return scores * _power_of_two(-self._state_shift(states)) * 2.0**-self._shift

    @property
    def _shift(self) -> int:
        return self.bits - self.exponent

    def _state_shift(self, states: Tensor) -> Int64[Tensor, "U 1"]:
        peak_U1 = states.double().abs().amax(dim=1, keepdim=True)
        if not torch.isfinite(peak_U1).all():
            raise DivergedError("a user's state is NaN or infinite, so no item can be ranked")
        return self.state_bits - torch.frexp(peak_U1).exponent.long()


def _power_of_two(exponent: Int64[Tensor, "U 1"]) -> Float[Tensor, "U 1"]:
    """Two to a whole power in float64, made of its bits: torch.ldexp goes through float32."""
    return (exponent.clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def item_chunks(
    grid: ItemGrid, states_UD: Float[Tensor, "U D"], item_chunk: int
) -> Iterator[tuple[int, Float[Tensor, "U C"]]]:
    """First item id and scores of each chunk of the catalog, PAD left out.

    The scores live in one buffer: what a chunk yields is gone when the next is asked for.
    """
    num_users = states_UD.shape[0]
    buffer = states_UD.new_empty(num_users * min(item_chunk, grid.num_items))
    for first in range(PAD_ID + 1, grid.num_items + 1, item_chunk):
        rows_CD = grid.rows(slice(first, first + item_chunk))
        scores_UC = buffer[: num_users * rows_CD.shape[0]].view(num_users, -1)
        yield first, torch.mm(states_UD, rows_CD.T, out=scores_UC)


def target_ranks(
    states: Float[Tensor, "U D"],
    grid: ItemGrid,
    targets: Int64[Tensor, " U"],
    *,
    item_chunk: int,
) -> Int64[Tensor, " U"]:
    """Rank of each user's target among all items, 1 for the best.

    Args:
        states: Any scale.
        grid: The catalog.
        targets: Item ids in 1..V.
        item_chunk: Items scored at once; bounds the memory to U * item_chunk scores.
    """
    states_UD = grid.states(states)
    score_U = (states_UD * grid.rows(targets)).sum(dim=1)
    ranks_U = torch.ones_like(targets)
    for first, scores_UC in item_chunks(grid, states_UD, item_chunk):
        end = first + scores_UC.shape[1]
        # Scores are whole numbers, so half a step lower also counts the ties, all of which precede
        # a target that lies behind this chunk.
        bar_U = torch.where(targets >= end, score_U - 0.5, score_U)
        # torch sums booleans into 64-bit integers eight times as slowly.
        ranks_U += (scores_UC > bar_U[:, None]).sum(dim=1, dtype=torch.int32)
        inside = ((targets >= first) & (targets < end)).nonzero()[:, 0]
        ids_C = torch.arange(first, end, device=targets.device)
        tied_IC = scores_UC[inside] == score_U[inside, None]
        earlier_IC = ids_C < targets[inside, None]
        ranks_U[inside] += (tied_IC & earlier_IC).sum(dim=1)
    return ranks_U


def seen_before_target(
    states: Float[Tensor, "U D"],
    grid: ItemGrid,
    targets: Int64[Tensor, " U"],
    seen_user: Int64[Tensor, " S"],
    seen_item: Int64[Tensor, " S"],
) -> Int64[Tensor, " U"]:
    """How many of each user's seen items rank before the target: what masking them would gain.

    Args:
        states: As for `target_ranks`.
        grid: The catalog.
        targets: Item ids in 1..V.
        seen_user: Row of `states` of each seen pair.
        seen_item: Item id in 1..V; no pair twice.
    """
    states_UD = grid.states(states)
    score_U = (states_UD * grid.rows(targets)).sum(dim=1)
    count_U = torch.zeros_like(targets)
    for user, item in zip(
        seen_user.split(PAIRS_AT_ONCE), seen_item.split(PAIRS_AT_ONCE), strict=True
    ):
        score = (states_UD[user] * grid.rows(item)).sum(dim=1)
        before = (score > score_U[user]) | ((score == score_U[user]) & (item < targets[user]))
        count_U.index_add_(0, user, before.long())
    return count_U


def sampled_ranks(
    states: Float[Tensor, "U D"],
    grid: ItemGrid,
    targets: Int64[Tensor, " U"],
    negatives: Int64[Tensor, "U N"],
) -> Int64[Tensor, " U"]:
    """Rank of each user's target among it and the user's negatives, 1 for the best.

    Every negative that scores as much as the target goes before it, as in the released code of
    TCLARec (doi:10.1145/3726302.3730101): a model that tells no items apart ranks all targets last.

    Args:
        states: As for `target_ranks`.
        grid: The catalog.
        targets: Item ids in 1..V.
        negatives: Item ids in 1..V, of each user different ones and not the target.
    """
    states_UD = grid.states(states)
    score_U = (states_UD * grid.rows(targets)).sum(dim=1)
    users_at_once = max(PAIRS_AT_ONCE // max(negatives.shape[1], 1), 1)
    before = [torch.zeros_like(targets[:0])]
    for state, score, items in zip(
        states_UD.split(users_at_once),
        score_U.split(users_at_once),
        negatives.split(users_at_once),
        strict=True,
    ):
        vectors = grid.rows(items.flatten()).view(*items.shape, -1)
        scores = (vectors @ state[:, :, None])[:, :, 0]
        before.append((scores >= score[:, None]).sum(dim=1))
    return 1 + torch.cat(before)


def top_items(
    states: Float[Tensor, "U D"],
    grid: ItemGrid,
    k: int,
    *,
    item_chunk: int,
    seen: tuple[Int64[Tensor, " S"], Int64[Tensor, " S"]] | None = None,
) -> tuple[Int64[Tensor, "U K"], Float[Tensor, "U K"]]:
    """The k best items of each user and their scores, in the same order as the ranks.

    Args:
        states: As for `target_ranks`.
        grid: The catalog.
        k: Items a user; fewer come back where the catalog is smaller.
        item_chunk: Items scored at once.
        seen: User rows and item ids of pairs that are no candidates.

    Returns:
        Item ids, PAD_ID where a user has fewer than k candidates; and scores in the method's own
        units, -inf there.
    """
    states_UD = grid.states(states)
    best_ids = states_UD.new_empty((states_UD.shape[0], 0), dtype=torch.long)
    best_scores = states_UD.new_empty((states_UD.shape[0], 0))
    for first, scores_UC in item_chunks(grid, states_UD, item_chunk):
        if seen is not None:
            user, column = seen[0], seen[1] - first
            here = (column >= 0) & (column < scores_UC.shape[1])
            scores_UC[user[here], column[here]] = float("-inf")
        scores, columns = _first_k(scores_UC, k)
        # What is best so far has lower ids, and the sort is stable, so ties keep their order.
        scores, order = torch.cat([best_scores, scores], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        ids = torch.cat([best_ids, columns + first], dim=1).gather(1, order)
        best_scores, best_ids = scores[:, :k], ids[:, :k]
    none = best_scores == float("-inf")
    return best_ids.masked_fill(none, PAD_ID), grid.true_scores(best_scores, states)


def _first_k(
    scores_UC: Float[Tensor, "U C"], k: int
) -> tuple[Float[Tensor, "U K"], Int64[Tensor, "U K"]]:
    """The k highest scores of each row and their columns, in rising column order among equals."""
    k = min(k, scores_UC.shape[1])
    scores_UK, columns_UK = scores_UC.topk(k, dim=1)
    # topk picks any of the items that tie for the last place; where it had a choice, sort.
    unsure = ((scores_UC >= scores_UK[:, -1:]).sum(dim=1, dtype=torch.int32) > k).nonzero()[:, 0]
    if unsure.numel():
        scores, columns = scores_UC[unsure].sort(dim=1, descending=True, stable=True)
        scores_UK[unsure], columns_UK[unsure] = scores[:, :k], columns[:, :k]
    columns_UK, order = columns_UK.sort(dim=1)
    scores_UK = scores_UK.gather(1, order)
    scores_UK, order = scores_UK.sort(dim=1, descending=True, stable=True)
    return scores_UK, columns_UK.gather(1, order)
