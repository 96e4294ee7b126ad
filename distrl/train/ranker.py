"""Ranks one shard of a store: the model, and the baselines beside it. Knows no Ray.

Dimensions: U users, D hidden, V items.
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
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.id_hash import hash_ids
from distrl.nn.histories import pad_histories
from distrl.ops.held_out import Cases, held_out_cases, last_occurrence, renamed
from distrl.ops.metrics import MISS, RankCounts
from distrl.ops.ragged import Ragged
from distrl.ops.ranking import ItemGrid, seen_before_target, target_ranks, top_items
from distrl.ops.sequences import with_random_items
from distrl.schema import PAD_ID, Shard, Split
from distrl.train.baselines import rank_by_popularity, rank_by_recency, seen_targets
from distrl.train.reading import ragged, shard_batches

Policy = Literal["kept", "masked"]
"""Whether items of the history stay candidates. A masked target that was seen is a miss."""

MODEL, POPULARITY, REPEAT_RECENT = "model", "popularity", "repeat_recent"

ITEMS_AT_ONCE = 2048
"""Items of histories in one pass of the encoder; padding adds at most as many slots."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What ranking some users gave; adding tallies is exact."""

    ranks: Mapping[str, RankCounts]
    """By `ranker/policy`, such as `model/kept`."""
    num_skipped: int
    """Users too short for a case."""
    num_unknown: int
    """Cases that are misses because the model knows the target, or all of the history, not."""

    def __add__(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            {name: counts + other.ranks[name] for name, counts in self.ranks.items()},
            self.num_skipped + other.num_skipped,
            self.num_unknown + other.num_unknown,
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
    """Popularity rank of each item of the store; None leaves the baselines out."""
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
        tally = self._tally(held_out_cases(Ragged.of([]), self._task.split), 0, None)
        columns = ["user", "items"] if self._noise else ["items"]
        for batch in shard_batches(self._task.store_uri, shard, self._config.batch_size, columns):
            sequences = ragged(batch.column("items"))
            cases = held_out_cases(sequences, self._task.split)
            num_users = len(sequences.lengths)
            users = batch.column("user").take(pa.array(cases.rows)) if self._noise else None
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

    def _tally(self, cases: Cases, num_skipped: int, users: pa.Array | None) -> Tally:
        kept, masked, num_unknown = self._model_ranks(self._in_model_ids(cases), users)
        ranks = {f"{MODEL}/kept": kept, f"{MODEL}/masked": masked}
        if self._task.popularity is not None:
            kept, masked = rank_by_popularity(cases, self._task.popularity)
            ranks |= {f"{POPULARITY}/kept": kept, f"{POPULARITY}/masked": masked}
            recent = rank_by_recency(cases)
            nothing = np.full_like(recent, MISS)  # all it can name is masked
            ranks |= {f"{REPEAT_RECENT}/kept": recent, f"{REPEAT_RECENT}/masked": nothing}
        bounds, max_rank = self._config.length_bounds, max(self._config.cutoffs)
        counts = {
            name: RankCounts.of(values, cases.lengths, bounds, max_rank)
            for name, values in ranks.items()
        }
        return Tally(counts, num_skipped, num_unknown)

    def _in_model_ids(self, cases: Cases) -> Cases:
        return cases if self._task.item_map is None else renamed(cases, self._task.item_map)

    @torch.inference_mode()
    def _model_ranks(
        self, cases: Cases, users: pa.Array | None
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"], int]:
        """Ranks kept and masked of all cases, and how many the model cannot rank.

        Users, one a case, are there where histories are read with noise.
        """
        kept = np.full(len(cases.targets), MISS, dtype=np.int64)
        masked = kept.copy()
        known = np.flatnonzero((cases.targets != PAD_ID) & (cases.histories.lengths > 0))
        num_unknown = len(kept) - len(known)
        if len(known):
            histories = cases.histories.take(known)
            read = histories
            if users is not None:
                read = self._noisy(histories, users.take(pa.array(known)))
            states = self._states(read)
            targets = self._tensor(cases.targets[known])
            seen = self._distinct(histories)
            rank = target_ranks(states, self._grid, targets, item_chunk=self._config.item_chunk)
            gain = seen_before_target(states, self._grid, targets, *seen)
            kept[known] = rank.cpu().numpy()
            masked[known] = (rank - gain).cpu().numpy()
            masked[seen_targets(cases)] = MISS
        return kept, masked, num_unknown

    def _noisy(self, histories: Ragged, users: pa.Array) -> Ragged:
        """What the model reads instead, in a study of noise; nothing else sees it."""
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

    def _tensor(self, values: Int64[np.ndarray, " n"]) -> Int64[Tensor, " n"]:
        return torch.from_numpy(values).to(self._device)


def _cuts(lengths: Int64[np.ndarray, " U"]) -> Int64[np.ndarray, " cuts"]:
    """Where to cut rising lengths: every ITEMS_AT_ONCE items, and wherever lengths have doubled."""
    full = np.cumsum(lengths) // ITEMS_AT_ONCE
    doubled = np.ceil(np.log2(lengths))
    return np.flatnonzero((np.diff(full) > 0) | (np.diff(doubled) > 0)) + 1


def encoder_dtype(config: EvaluationConfig) -> torch.dtype:
    """The precision of the encoder's pass."""
    return torch.float64 if config.dtype == "float64" else torch.float32
