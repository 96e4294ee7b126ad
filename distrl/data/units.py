"""Reads units, an epoch of a shard each, in an order that only the seed decides."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrl.data.config import DataConfig
from distrl.data.plan import UnitWork, not_in, num_samples
from distrl.data.store import verify_shard
from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.schema import NUM_HELD_OUT, Manifest, Shard
from distrl.storage import explained, join, open_input

BLOCK_SAMPLES = 2048
"""Samples in a block of the stream: what goes to one worker at a time."""


@dataclass(frozen=True, slots=True)
class UnitReader:
    """Serves the samples of units of one store."""

    manifest: Manifest
    config: DataConfig
    seed: int

    def read(self, work: UnitWork) -> Iterator[pa.Table]:
        """What is left of a unit, in blocks with columns epoch, shard, serial, items.

        Row groups come in an order drawn from (seed, epoch, shard), samples shuffled within each;
        a row group at most is in memory. Serials number the samples in that order, so what is left
        out does not change what the others are called.

        Raises:
            SchemaError: If the shard is not what the manifest says.
            StorageError: If it cannot be read.
        """
        shard = self.manifest.sequences[work.shard]
        if self.config.verify_checksums and work.epoch == 0 and not work.done:
            verify_shard(self.config.store_uri, shard)
        serial = 0
        for samples in self._shuffled(shard, work):
            serials = np.arange(serial, serial + len(samples.lengths))
            serial += len(serials)
            left = np.flatnonzero(not_in(serials, work.done))
            for start in range(0, len(left), BLOCK_SAMPLES):
                chosen = left[start : start + BLOCK_SAMPLES]
                yield _table(work, serials[chosen], samples.take(chosen))
        expected = num_samples(shard, self.config)
        if serial != expected:
            raise SchemaError(
                f"shard {join(self.config.store_uri, shard.path)} gave {serial} samples, its "
                f"manifest promises {expected}; prepare the store again"
            )

    def _shuffled(self, shard: Shard, work: UnitWork) -> Iterator[Ragged]:
        """Samples of a shard, some thousands at a time, shuffled."""
        rng = np.random.default_rng((self.seed, work.epoch, work.shard))
        uri = join(self.config.store_uri, shard.path)
        try:
            with open_input(uri) as source:
                file = pq.ParquetFile(source)
                if file.metadata.num_rows != shard.rows:
                    raise SchemaError(
                        f"shard {uri} has {file.metadata.num_rows} rows, its manifest says "
                        f"{shard.rows}; prepare the store again"
                    )
                for group in rng.permutation(file.num_row_groups).tolist():
                    items = file.read_row_group(group, columns=["items"]).column("items")
                    yield from self._samples(_training_parts(items.combine_chunks()), rng)
        except pa.ArrowException as error:
            first = str(error).splitlines()[0]
            raise SchemaError(f"shard {uri} is torn or no Parquet file: {first}") from error
        except OSError as error:
            raise explained(uri, "read", error) from error

    def _samples(self, parts: Ragged, rng: np.random.Generator) -> Iterator[Ragged]:
        """Training parts as samples in random order."""
        if self.config.samples == "all_positions":
            yield parts.take(rng.permutation(len(parts.lengths)))
            return
        rows = parts.rows
        position = np.arange(len(rows)) - parts.offsets[:-1][rows]
        targets = rng.permutation(np.flatnonzero(position > 0))
        # Prefixes repeat items many times over, so only a block of them is spelled out at once.
        for start in range(0, len(targets), BLOCK_SAMPLES):
            newest = targets[start : start + BLOCK_SAMPLES]
            count = np.minimum(position[newest], self.config.max_len) + 1
            offsets = np.concatenate([[0], np.cumsum(count)])
            within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], count)
            yield Ragged(parts.values[np.repeat(newest - count + 1, count) + within], offsets)


def _training_parts(items: pa.ListArray) -> Ragged:
    """Sequences without what is held out, of the users who then have a target left."""
    offsets = items.offsets.to_numpy().astype(np.int64)
    values = items.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    whole = Ragged(values, offsets - offsets[0])
    lengths = whole.lengths - NUM_HELD_OUT
    kept = np.repeat(whole.offsets[1:], whole.lengths) - np.arange(len(values)) > NUM_HELD_OUT
    return whole.keep(kept).take(np.flatnonzero(lengths >= 2))


def _table(work: UnitWork, serials: np.ndarray, items: Ragged) -> pa.Table:
    size = len(serials)
    return pa.table(
        {
            "epoch": pa.array(np.full(size, work.epoch, dtype=np.int32)),
            "shard": pa.array(np.full(size, work.shard, dtype=np.int32)),
            "serial": pa.array(serials.astype(np.int64)),
            "items": pa.ListArray.from_arrays(
                pa.array(items.offsets.astype(np.int32)), pa.array(items.values.astype(np.int32))
            ),
        }
    )
