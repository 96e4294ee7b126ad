"""Ranks one shard of a store: the model, and the baselines beside it. Knows no Ray.

Dimensions: U users, D hidden, V items, N negatives a user.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distrl.contract import Method
from distrl.data.evaluation_config import EvaluationConfig, RankingProtocol
from distrl.data.id_hash import hash_ids
from distrl.nn.histories import pad_histories
from distrl.ops.held_out import Cases, held_out_cases, last_occurrence, renamed
from distrl.ops.metrics import MISS, RankCounts
from distrl.ops.negatives import (
    NUM_NEGATIVES,
    UnseenItems,
    negative_keys,
    random_unseen_items,
)
from distrl.ops.ragged import Ragged, appended
from distrl.ops.ranking import (
    ItemGrid,
    sampled_ranks,
    seen_before_target,
    target_ranks,
    top_items,
)
from distrl.ops.sequences import with_random_items
from distrl.schema import PAD_ID, Shard, Split
from distrl.train.baselines import rank_by_popularity, rank_by_recency, seen_targets
from distrl.train.reading import ragged, shard_batches
from distrl.train.sampled import sampled_popularity, sampled_recency

Policy = Literal["kept", "masked", "sampled99"]
"""Whether items of the history stay candidates. A masked target that was seen is a miss. Sampled
candidates hold none of them, so there the question does not arise."""

POLICIES: dict[RankingProtocol, tuple[Policy, ...]] = {
    "full": ("kept", "masked"),
    "sampled99": ("sampled99",),
}
"""How targets are ranked under each protocol; the first counts every case."""

MODEL, POPULARITY, REPEAT_RECENT = "model", "popularity", "repeat_recent"

ITEMS_AT_ONCE = 2048
"""Items of histories in one pass of the encoder; padding adds at most as many slots."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What ranking some users gave; adding tallies is exact."""

    ranks: Mapping[str, RankCounts]
    """By `ranker/policy`, such as `model/kept` or `model/sampled99`."""
    num_skipped: int
    """Users too short for a case."""
    num_unknown: int
    """Cases that are misses because the model knows the target, or all of the history, not."""
    num_crowded: int
    """Users whose sequence leaves fewer items than the sampled protocol draws."""

    def __add__(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            {name: counts + other.ranks[name] for name, counts in self.ranks.items()},
            self.num_skipped + other.num_skipped,
            self.num_unknown + other.num_unknown,
            self.num_crowded + other.num_crowded,
        )


@dataclass(frozen=True, slots=True)
class TopItems:
    """The best items of some users, in the model's item ids."""

    users: pa.Array
    items: Int64[np.ndarray, "U K"]
    scores: Float[np.ndarray, "U K"]


@dataclass(frozen=True, slots=True)
class RankingTask:
    """What is ranked, and how; all but the model."""

    max_len: int
    """Newest items of a history that the model reads."""
    store_uri: str
    split: Split
    """Which held-out items are the targets."""
    config: EvaluationConfig
    popularity: Int64[np.ndarray, " items"] | None
    """Popularity rank of each item of the store, of the protocol's kind; None leaves the baselines
    out."""
    item_map: Int64[np.ndarray, " items"] | None
    """The model's id of each item id of the store; None where they are the same."""


class Ranker:
    """A model ready to rank shards of one store."""

    def __init__(self, method: Method, task: RankingTask) -> None:
        """Moves the method to where and how it is ranked.

        Args:
            method: The model; it is changed to eval mode, the task's dtype and its device, so hand
                over a copy.
            task: What to rank.

        Raises:
            DivergedError: If an item vector is not finite.
        """
        self._task, self._config = task, task.config
        self._noise = task.config.noise_share if task.split == "test" else 0.0
        self._device = torch.device("cuda" if task.config.gpus_per_worker > 0 else "cpu")
        self._method = method.to(self._device, encoder_dtype(task.config)).eval()
        with torch.inference_mode():
            self._grid = ItemGrid.of(self._method.item_vectors)

    def rank(self, shard: Shard, on_batch: Callable[[int], None] = lambda users: None) -> Tally:
        """Ranks the held-out item of every user of a shard.

        Args:
            shard: One of the store's.
            on_batch: Told how many users each batch had.

        Raises:
            SchemaError: If the shard is torn or not what the manifest says.
            StorageError: If it cannot be read.
            DivergedError: If a state is not finite.
        """
        nobody = pa.array([], pa.int64())
        tally = self._tally(held_out_cases(Ragged.of([]), self._task.split), 0, nobody)
        # Whatever is drawn for a user is drawn by the user's id.
        draws = self._noise > 0 or self._config.protocol == "sampled99"
        columns = ["user", "items"] if draws else ["items"]
        for batch in shard_batches(self._task.store_uri, shard, self._config.batch_size, columns):
            sequences = ragged(batch.column("items"))
            cases = held_out_cases(sequences, self._task.split)
            num_users = len(sequences.lengths)
            users = batch.column("user").take(pa.array(cases.rows)) if draws else nobody
            tally += self._tally(cases, num_users - len(cases.targets), users)
            on_batch(num_users)
        return tally

    def top(self, shard: Shard, k: int, *, mask_seen: bool) -> Iterator[TopItems]:
        """The k best items of every user of a shard that has a case and a known history.

        PAD_ID and -inf fill up users with fewer candidates.
        """
        columns = ["user", "items"]
        for batch in shard_batches(self._task.store_uri, shard, self._config.batch_size, columns):
            sequences = ragged(batch.column("items"))
            cases = self._in_model_ids(held_out_cases(sequences, self._task.split))
            known = np.flatnonzero(cases.histories.lengths > 0)
            if not len(known):
                continue
            histories = cases.histories.take(known)
            with torch.inference_mode():
                ids, scores = top_items(
                    self._states(histories),
                    self._grid,
                    k,
                    item_chunk=self._config.item_chunk,
                    seen=self._distinct(histories) if mask_seen else None,
                )
            chosen = pa.array(cases.rows[known])
            yield TopItems(
                batch.column("user").take(chosen), ids.cpu().numpy(), scores.cpu().numpy()
            )

    def _tally(self, cases: Cases, num_skipped: int, users: pa.Array) -> Tally:
        """Counts of some cases; users, one a case, are there where something is drawn for them."""
        num_unknown, num_crowded = 0, 0
        if self._config.protocol == "sampled99":
            ranks, num_crowded = self._sampled_ranks(cases, users)
        else:
            ranks, num_unknown = self._full_ranks(cases, users)
        bounds, max_rank = self._config.length_bounds, max(self._config.cutoffs)
        counts = {
            name: RankCounts.of(values, cases.lengths, bounds, max_rank)
            for name, values in ranks.items()
        }
        return Tally(counts, num_skipped, num_unknown, num_crowded)

    def _full_ranks(
        self, cases: Cases, users: pa.Array
    ) -> tuple[dict[str, Int64[np.ndarray, " U"]], int]:
        """Ranks by ranker and policy, and how many cases the model cannot rank."""
        kept, masked, num_unknown = self._model_ranks(self._in_model_ids(cases), users)
        ranks = {f"{MODEL}/kept": kept, f"{MODEL}/masked": masked}
        if self._task.popularity is not None:
            kept, masked = rank_by_popularity(cases, self._task.popularity)
            ranks |= {f"{POPULARITY}/kept": kept, f"{POPULARITY}/masked": masked}
            recent = rank_by_recency(cases)
            nothing = np.full_like(recent, MISS)  # all it can name is masked
            ranks |= {f"{REPEAT_RECENT}/kept": recent, f"{REPEAT_RECENT}/masked": nothing}
        return ranks, num_unknown

    def _sampled_ranks(
        self, cases: Cases, users: pa.Array
    ) -> tuple[dict[str, Int64[np.ndarray, " U"]], int]:
        """Ranks by ranker among sampled candidates, and how many users have too few of them."""
        unseen = UnseenItems.of(appended(cases.histories, cases.targets), self._num_store_items)
        num_crowded = int((unseen.counts < NUM_NEGATIVES).sum())
        # One such user fails the evaluation, once it has counted them all: ranks matter no more.
        if num_crowded:
            nothing = np.full(len(cases.targets), MISS, dtype=np.int64)
            baselines = [] if self._task.popularity is None else [POPULARITY, REPEAT_RECENT]
            return {f"{name}/sampled99": nothing for name in [MODEL, *baselines]}, num_crowded
        keys = negative_keys(hash_ids(users, self._config.negatives_seed), self._task.split)
        negatives = random_unseen_items(unseen, NUM_NEGATIVES, keys)
        ranks = {f"{MODEL}/sampled99": self._model_sampled_ranks(cases, negatives, users)}
        if self._task.popularity is not None:
            popularity = sampled_popularity(cases, negatives, self._task.popularity)
            ranks |= {
                f"{POPULARITY}/sampled99": popularity,
                f"{REPEAT_RECENT}/sampled99": sampled_recency(cases),
            }
        return ranks, 0

    @property
    def _num_store_items(self) -> int:
        item_map = self._task.item_map
        return self._grid.num_items if item_map is None else len(item_map) - 1

    def _in_model_ids(self, cases: Cases) -> Cases:
        return cases if self._task.item_map is None else renamed(cases, self._task.item_map)

    @torch.inference_mode()
    def _model_ranks(
        self, cases: Cases, users: pa.Array
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"], int]:
        """Ranks kept and masked of all cases, and how many the model cannot rank."""
        kept = np.full(len(cases.targets), MISS, dtype=np.int64)
        masked = kept.copy()
        known = np.flatnonzero((cases.targets != PAD_ID) & (cases.histories.lengths > 0))
        num_unknown = len(kept) - len(known)
        if len(known):
            histories = cases.histories.take(known)
            read = users.take(pa.array(known)) if self._noise else users
            states = self._states(self._as_read(histories, read))
            targets = self._tensor(cases.targets[known])
            seen = self._distinct(histories)
            rank = target_ranks(states, self._grid, targets, item_chunk=self._config.item_chunk)
            gain = seen_before_target(states, self._grid, targets, *seen)
            kept[known] = rank.cpu().numpy()
            masked[known] = (rank - gain).cpu().numpy()
            masked[seen_targets(cases)] = MISS
        return kept, masked, num_unknown

    @torch.inference_mode()
    def _model_sampled_ranks(
        self, cases: Cases, negatives: Int64[np.ndarray, "U N"], users: pa.Array
    ) -> Int64[np.ndarray, " U"]:
        """Ranks of all cases; the model knows every item of the store."""
        if not len(cases.targets):
            return cases.targets
        known = self._in_model_ids(cases)
        item_map = self._task.item_map
        states = self._states(self._as_read(known.histories, users))
        ranks = sampled_ranks(
            states,
            self._grid,
            self._tensor(known.targets),
            self._tensor(negatives if item_map is None else item_map[negatives]),
        )
        return ranks.cpu().numpy()

    def _as_read(self, histories: Ragged, users: pa.Array) -> Ragged:
        """What the model reads instead, in a study of noise; nothing else sees it."""
        if not self._noise:
            return histories
        num_items = self._method.item_vectors.shape[0] - 1
        keys = hash_ids(users, self._config.noise_seed)
        return with_random_items(histories, self._task.max_len, self._noise, num_items, keys)

    def _states(self, histories: Ragged) -> Float[Tensor, "U D"]:
        """One state a history, encoded in order of length, so that little is padded."""
        lengths = np.minimum(histories.lengths, self._task.max_len)
        order = np.argsort(lengths, kind="stable")
        parts = [
            self._method.user_states(
                pad_histories(histories.take(rows), self._task.max_len).to(self._device)
            )
            for rows in np.split(order, _cuts(lengths[order]))
        ]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return torch.cat(parts)[self._tensor(place)]

    def _distinct(self, histories: Ragged) -> tuple[Int64[Tensor, " S"], Int64[Tensor, " S"]]:
        """User row and item id of each item that a user has seen, once."""
        distinct = histories.keep(last_occurrence(histories))
        return self._tensor(distinct.rows), self._tensor(distinct.values)

    def _tensor(self, values: Int64[np.ndarray, "..."]) -> Int64[Tensor, "..."]:
        return torch.from_numpy(values).to(self._device)


def _cuts(lengths: Int64[np.ndarray, " U"]) -> Int64[np.ndarray, " cuts"]:
    """Where to cut rising lengths: every ITEMS_AT_ONCE items, and wherever lengths have doubled."""
    full = np.cumsum(lengths) // ITEMS_AT_ONCE
    doubled = np.ceil(np.log2(lengths))
    return np.flatnonzero((np.diff(full) > 0) | (np.diff(doubled) > 0)) + 1


def encoder_dtype(config: EvaluationConfig) -> torch.dtype:
    """The precision of the encoder's pass."""
    return torch.float64 if config.dtype == "float64" else torch.float32
