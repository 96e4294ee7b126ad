"""The top items of histories in the caller's own ids. Dimensions: U users, D hidden."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64

from distrl.errors import SchemaError
from distrl.nn.histories import pad_histories
from distrl.ops.held_out import last_occurrence
from distrl.ops.ragged import Ragged
from distrl.ops.ranking import ItemGrid, top_items
from distrl.schema import PAD_ID
from distrl.serving.artifact import Artifact

USERS_AT_ONCE = 256
ITEM_CHUNK = 8192
"""USERS_AT_ONCE * ITEM_CHUNK scores of 8 bytes are held, however large the catalog."""


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The best items of some users; row i belongs to history i."""

    items: pa.ListArray
    """The caller's own ids, the best first; fewer than k where there are fewer candidates."""
    scores: pa.ListArray
    num_unknown: Int64[np.ndarray, " U"]
    """Entries of each history that the model does not know; it does as if they were not there."""


class Recommender:
    """A model ready to answer.

    Items rank by falling score and equal scores by falling frequency (rising item id), in float64,
    so an answer does not depend on what else is asked with it. A history without any known item
    gets the most frequent items of the training data, all with the score 0.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._method = artifact.method.double().eval()
        with torch.inference_mode():
            self._grid = ItemGrid.of(self._method.item_vectors)

    def recommend(self, histories: pa.ListArray, k: int, *, mask_seen: bool) -> Recommendations:
        """The k best items after each history.

        Args:
            histories: The caller's own ids, oldest first; of the model's item type, or one that
                casts to it. A null entry counts as unknown.
            k: Items a history, 1 or more.
            mask_seen: Leave out the items of the history.

        Raises:
            SchemaError: If k is not positive, or the ids are of another type.
        """
        if k < 1:
            raise SchemaError(f"k={k}: at least 1 item must be asked for")
        known, num_unknown = self._known(histories)
        parts = list(self._answers(known, k, mask_seen=mask_seen))
        ids = np.concatenate([ids for ids, _ in parts]) if parts else np.empty((0, k), np.int64)
        scores = np.concatenate([scores for _, scores in parts]) if parts else np.empty((0, k))
        there = ids != PAD_ID
        offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(axis=1))]), type=pa.int32())
        items = self._artifact.items.take(pa.array(ids[there] - 1))
        return Recommendations(
            pa.ListArray.from_arrays(offsets, items),
            pa.ListArray.from_arrays(offsets, pa.array(scores[there])),
            num_unknown,
        )

    def _known(self, histories: pa.ListArray) -> tuple[Ragged, Int64[np.ndarray, " U"]]:
        """Histories in the model's ids without unknown items, and how many were unknown."""
        ids = self._artifact.item_ids(histories.flatten())
        lengths = histories.value_lengths().fill_null(0).to_numpy()
        ragged = Ragged(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        known = ragged.keep(ids != PAD_ID)
        return known, ragged.lengths - known.lengths

    @torch.inference_mode()
    def _answers(
        self, known: Ragged, k: int, *, mask_seen: bool
    ) -> Iterator[tuple[Int64[np.ndarray, "U K"], np.ndarray]]:
        """Item ids and scores of a bounded number of users at a time; PAD_ID fills up."""
        num_users = len(known.lengths)
        for first in range(0, num_users, USERS_AT_ONCE):
            rows = np.arange(first, min(first + USERS_AT_ONCE, num_users))
            yield self._answer(known.take(rows), k, mask_seen=mask_seen)

    def _answer(
        self, histories: Ragged, k: int, *, mask_seen: bool
    ) -> tuple[Int64[np.ndarray, "U K"], np.ndarray]:
        num_users = len(histories.lengths)
        ids = np.full((num_users, k), PAD_ID, dtype=np.int64)
        scores = np.zeros((num_users, k))
        count = min(k, self._grid.num_items)
        ids[:, :count] = np.arange(PAD_ID + 1, count + 1)  # the most frequent items
        asked = np.flatnonzero(histories.lengths)
        if len(asked):
            chosen = histories.take(asked)
            distinct = chosen.keep(last_occurrence(chosen))
            best, best_scores = top_items(
                self._method.user_states(pad_histories(chosen, self._artifact.catalog.max_len)),
                self._grid,
                k,
                item_chunk=ITEM_CHUNK,
                seen=(torch.from_numpy(distinct.rows), torch.from_numpy(distinct.values))
                if mask_seen
                else None,
            )
            ids[asked, : best.shape[1]] = best.numpy()
            scores[asked, : best.shape[1]] = best_scores.numpy()
        return ids, scores
