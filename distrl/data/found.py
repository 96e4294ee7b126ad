"""The neighbors of contrasted prefixes on their way from a store to a batch.

Dimensions: S samples, P contrasted prefixes, N neighbors of all of them, E of text vectors.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Int64

from distrl.ops.ragged import Ragged

PREFIX = "neighbor_"
"""Of the columns of a block that neighbors travel in."""


@dataclass(frozen=True, slots=True)
class Found:
    """Neighbors of P prefixes, the nearest first."""

    own: Float16[np.ndarray, "P E"]
    """Vectors of the prefixes' texts."""
    counts: Int64[np.ndarray, " P"]
    """Neighbors of each."""
    window: Int64[np.ndarray, " N"]
    """A number that no other window of the store has."""
    user: Int64[np.ndarray, " N"]
    """A number that no other user of the store has."""
    length: Int64[np.ndarray, " N"]
    """Items of the prefix that the neighbor is, of which it shows the newest."""
    items: Ragged
    """N rows: the items it shows."""
    vectors: Float16[np.ndarray, "N E"]

    def take(self, prefixes: Int64[np.ndarray, " taken"]) -> "Found":
        """Those of some of the prefixes, in the order asked for."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        whole = Ragged(np.arange(len(self.window)), starts).take(prefixes).values
        some = replace(self, own=self.own[prefixes], counts=self.counts[prefixes])
        return some.with_neighbors(whole, some.counts)

    def with_neighbors(
        self, chosen: Int64[np.ndarray, " M"], counts: Int64[np.ndarray, " P"]
    ) -> "Found":
        """Some of the N neighbors, in the order asked for; the prefixes have so many of them."""
        return Found(
            self.own,
            counts,
            self.window[chosen],
            self.user[chosen],
            self.length[chosen],
            self.items.take(chosen),
            self.vectors[chosen],
        )

    def columns(self, pairs: Int64[np.ndarray, " S"]) -> dict[str, pa.Array]:
        """Columns with a row a sample, which has the next `pairs` of the prefixes."""
        ends = np.concatenate([[0], np.cumsum(self.counts)])
        prefix_at = np.concatenate([[0], np.cumsum(pairs)])
        neighbor_at = ends[prefix_at]
        width = self.own.shape[1]
        lists = {
            "own": (self.own.reshape(-1), prefix_at * width),
            "count": (self.counts.astype(np.int32), prefix_at),
            "window": (self.window, neighbor_at),
            "user": (self.user, neighbor_at),
            "length": (self.length.astype(np.int32), neighbor_at),
            "shown": (self.items.lengths.astype(np.int32), neighbor_at),
            "items": (self.items.values.astype(np.int32), self.items.offsets[neighbor_at]),
            "vectors": (self.vectors.reshape(-1), neighbor_at * width),
        }
        return {PREFIX + name: _lists(*column) for name, column in lists.items()}

    @classmethod
    def of_table(cls, table: pa.Table, dimension: int) -> "Found":
        """What `columns` made, with vectors of so many numbers."""

        def flat(name: str) -> np.ndarray:
            return table.column(PREFIX + name).combine_chunks().flatten().to_numpy()

        shown = flat("shown").astype(np.int64)
        return cls(
            flat("own").reshape(-1, dimension),
            flat("count").astype(np.int64),
            flat("window"),
            flat("user"),
            flat("length").astype(np.int64),
            Ragged(flat("items").astype(np.int64), np.concatenate([[0], np.cumsum(shown)])),
            flat("vectors").reshape(-1, dimension),
        )


def no_neighbors(dimension: int) -> Found:
    """Of no prefixes."""
    nothing = np.zeros(0, dtype=np.int64)
    vectors = np.zeros((0, dimension), dtype=np.float16)
    return Found(vectors, nothing, nothing, nothing, nothing, Ragged.of([]), vectors)


def _lists(values: np.ndarray, offsets: Int64[np.ndarray, " S1"]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
