"""Reads units, an epoch of a shard each, in an order that only the seed decides.

What runs in Ray's reading tasks imports this file and not the stream, so that they start without
torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt64

from distrl.data.config import DataConfig
from distrl.data.contrasted import contrasted_ends
from distrl.data.neighbors import NeighborGroup, read_group, verify_windows
from distrl.data.plan import UnitWork, not_in, num_samples
from distrl.data.ragged_columns import to_ragged
from distrl.data.side_tables import SideManifest
from distrl.data.store import verify_shard
from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, permutation, sample_keys, seed_key
from distrl.schema import NUM_HELD_OUT, Manifest, Shard
from distrl.storage import explained, join, open_input

BLOCK_SAMPLES = 2048
BLOCK_TOKENS = 1 << 18
"""Bounds of what a reader spells out at once; a single sample may have more tokens."""

_SHUFFLE = 1 << 40
"""Purpose of draws: above any serial, whose keys come from the same unit's."""


@dataclass(frozen=True, slots=True)
class UnitReader:
    """Serves the samples of units of one store."""

    manifest: Manifest
    config: DataConfig
    seed: int
    neighbors: SideManifest | None = None
    """Of the table whose windows are joined into the samples that contrast them."""

    def read_rows(self, units: pa.Table) -> Iterator[pa.Table]:
        """What is left of each unit that `unit_row` put into a row of a table."""
        for row in units.to_pylist():
            ranges = [(start, stop) for start, stop in json.loads(row["done"])]
            yield from self.read(UnitWork(row["epoch"], row["shard"], ranges, row["first"]))

    def read(self, work: UnitWork) -> Iterator[pa.Table]:
        """What is left of a unit, in blocks with columns epoch, shard, serial, items.

        Where neighbors are wanted, those of each sample's contrasted prefixes stand beside it.

        Row groups come in an order drawn from (seed, epoch, shard), samples shuffled within each;
        a row group at most is in memory. Serials number the samples in that order, so what is left
        out does not change what the others are called.

        Raises:
            SchemaError: If the shard is not what the manifest says.
            StorageError: If it cannot be read.
        """
        shard = self.manifest.sequences[work.shard]
        if self.config.verify_checksums and work.first:
            verify_shard(self.config.store_uri, shard)
            if self.neighbors is not None:
                verify_windows(self.config.store_uri, self.neighbors, work.shard)
        key = mixed(mixed(mixed(seed_key(self.seed), work.epoch), work.shard), _SHUFFLE)
        serial = 0
        for number, group in self._row_groups(work.shard, shard, key):
            ends = self._ends(group.parts)
            ends = ends[permutation(len(ends), mixed(mixed(key, 1), number))]
            serials = np.arange(serial, serial + len(ends))
            serial += len(ends)
            left = not_in(serials, work.done)
            yield from self._blocks(work, group, ends[left], serials[left])
        expected = num_samples(shard, self.config)
        if serial != expected:
            raise SchemaError(
                f"shard {join(self.config.store_uri, shard.path)} gave {serial} samples, its "
                f"manifest promises {expected}; prepare the store again"
            )

    def _row_groups(
        self, place: int, shard: Shard, key: UInt64[np.ndarray, " 1"]
    ) -> Iterator[tuple[int, "_Group"]]:
        """Number and users of each row group, in the order that the key fixes."""
        uri = join(self.config.store_uri, shard.path)
        try:
            with open_input(uri) as source:
                if source.size() != shard.bytes:
                    raise SchemaError(
                        f"shard {uri} has {source.size()} bytes, its manifest says {shard.bytes}; "
                        "prepare the store again"
                    )
                file = pq.ParquetFile(source)
                if file.metadata.num_rows != shard.rows:
                    raise SchemaError(
                        f"shard {uri} has {file.metadata.num_rows} rows, its manifest says "
                        f"{shard.rows}; prepare the store again"
                    )
                for number in permutation(file.num_row_groups, mixed(key, 0)).tolist():
                    table = file.read_row_group(number, columns=["items"])
                    parts, rows = self._training_parts(uri, table)
                    sizes = (file.metadata.row_group(g).num_rows for g in range(number))
                    yield number, _Group(parts, rows + sum(sizes), self._found(place, number))
        except pa.ArrowException as error:
            first = str(error).splitlines()[0]
            raise SchemaError(f"shard {uri} is torn or no Parquet file: {first}") from error
        except OSError as error:
            raise explained(uri, "read", error) from error

    def _found(self, shard: int, group: int) -> NeighborGroup | None:
        if self.neighbors is None:
            return None
        return read_group(self.config.store_uri, self.neighbors, shard, group)

    def _training_parts(
        self, uri: str, table: pa.Table
    ) -> tuple[Ragged, Int64[np.ndarray, " users"]]:
        """Sequences without what is held out, of the users who then have a target left; which."""
        if table.column_names != ["items"] or not pa.types.is_list(table.schema.types[0]):
            raise SchemaError(f"shard {uri} has no column `items` of lists; it has {table.schema}")
        whole = to_ragged(table.column("items"))
        num_items = self.manifest.num_items
        if len(whole.values) and not 1 <= whole.values.min() <= whole.values.max() <= num_items:
            raise SchemaError(
                f"shard {uri} holds items {whole.values.min()} to {whole.values.max()}, its "
                f"manifest says 1 to {num_items}; prepare the store again"
            )
        lengths = whole.lengths - NUM_HELD_OUT
        rows = np.flatnonzero(lengths > 1)
        return whole.pieces(whole.offsets[rows], lengths[rows]), rows

    def _ends(self, parts: Ragged) -> Int64[np.ndarray, " samples"]:
        """Where each sample's newest target is."""
        if self.config.samples == "prefix":
            return np.flatnonzero(parts.positions > 0)
        return parts.offsets[1:] - 1

    def _blocks(
        self,
        work: UnitWork,
        group: "_Group",
        ends: Int64[np.ndarray, " samples"],
        serials: Int64[np.ndarray, " samples"],
    ) -> Iterator[pa.Table]:
        """Samples spelled out, a bounded block at a time: prefixes repeat items many times."""
        parts = group.parts
        lengths = parts.positions[ends] + 1
        if self.config.samples == "prefix" or self.config.long_sequences == "last":
            lengths = np.minimum(lengths, self.config.max_len + 1)
        tokens = np.cumsum(lengths) // BLOCK_TOKENS
        begins = (np.arange(len(ends)) % BLOCK_SAMPLES == 0) | (np.diff(tokens, prepend=0) > 0)
        for start, stop in pairwise([*np.flatnonzero(begins).tolist(), len(ends)]):
            here = slice(start, stop)
            items = parts.pieces(ends[here] - lengths[here] + 1, lengths[here])
            table = _table(work, serials[here], items)
            if group.found is not None:
                row = group.rows[parts.rows[ends[here]]]
                before = parts.positions[ends[here]] + 1 - lengths[here]
                for name, column in self._joined(
                    work, serials[here], items, row, before, group.found
                ):
                    table = table.append_column(name, column)
            yield table

    def _joined(
        self,
        work: UnitWork,
        serials: Int64[np.ndarray, " samples"],
        items: Ragged,
        row: Int64[np.ndarray, " samples"],
        before: Int64[np.ndarray, " samples"],
        found: NeighborGroup,
    ) -> Iterator[tuple[str, pa.Array]]:
        """Columns of the neighbors of each sample's contrasted prefixes.

        Args:
            work: The unit.
            serials: Of the samples.
            items: Of the samples, the newest target included.
            row: Of the shard, that each sample is of.
            before: Items of that row's history that the sample does not show.
            found: What the table says of the row group.
        """
        inputs = items.pieces(items.offsets[:-1], items.lengths - 1)
        same = np.full(len(serials), 0)
        keys = sample_keys(self.seed, same + work.epoch, same + work.shard, serials)
        count = 1 if self.config.samples == "prefix" else self.config.contrasted_prefixes
        ends = contrasted_ends(inputs, keys, count)
        sample = inputs.rows[ends]
        order = np.argsort(sample, kind="stable")
        ends, sample = ends[order], sample[order]
        length = before[sample] + inputs.positions[ends] + 1
        pairs = np.bincount(sample, minlength=len(serials))
        neighbors = found.of(row[sample], length, self.config.num_neighbors)
        yield from neighbors.columns(pairs).items()


@dataclass(frozen=True, slots=True)
class _Group:
    """Users of one row group who have a training target."""

    parts: Ragged
    """Their sequences without what is held out."""
    rows: Int64[np.ndarray, " users"]
    """Rows of the shard."""
    found: NeighborGroup | None


def unit_row(work: UnitWork) -> dict[str, int | bool | str]:
    """A unit as a row of a dataset; the ranges as text, so that all rows are of one type."""
    return {
        "epoch": work.epoch,
        "shard": work.shard,
        "done": json.dumps(work.done),
        "first": work.first,
    }


def _table(work: UnitWork, serials: Int64[np.ndarray, " n"], items: Ragged) -> pa.Table:
    size = len(serials)
    return pa.table(
        {
            "epoch": pa.array(np.full(size, work.epoch, dtype=np.int32)),
            "shard": pa.array(np.full(size, work.shard, dtype=np.int32)),
            "serial": pa.array(serials),
            "items": pa.ListArray.from_arrays(
                pa.array(items.offsets.astype(np.int32)), pa.array(items.values.astype(np.int32))
            ),
        }
    )
