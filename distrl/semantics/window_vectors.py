"""What a window's vector is of: the mean of its items' vectors, or their texts joined."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from distrl import storage
from distrl.data.store import verify_shard
from distrl.data.units import to_ragged
from distrl.errors import SchemaError
from distrl.ops.ragged import Ragged
from distrl.ops.windows import Windows, windows_of
from distrl.schema import Manifest, Shard
from distrl.semantics.embed_config import WindowsConfig

SEPARATOR = "; "
_NUMBERS_AT_ONCE = 1 << 23
"""Numbers of the items' vectors that a mean has before it at once: 32 MB."""


def shard_windows(
    store_uri: str, manifest: Manifest, shard: Shard, config: WindowsConfig
) -> Iterator[tuple[Ragged, Windows, int]]:
    """Sequences of each row group of a shard, its windows, and the number of its first row.

    Raises:
        SchemaError: If the shard is not what the manifest says.
        StorageError: If it cannot be read.
    """
    assert config.which != "none", "nobody asks for the windows of none"
    verify_shard(store_uri, shard)
    uri, first = storage.join(store_uri, shard.path), 0
    with storage.open_input(uri) as source:
        file = pq.ParquetFile(source)
        for number in range(file.num_row_groups):
            sequences = to_ragged(file.read_row_group(number, columns=["items"]).column("items"))
            values, num_items = sequences.values, manifest.num_items
            if len(values) and not 1 <= values.min() <= values.max() <= num_items:
                raise SchemaError(
                    f"shard {uri} holds items {values.min()} to {values.max()}, its manifest says "
                    f"1 to {num_items}; prepare the store again"
                )
            lengths = sequences.lengths
            yield sequences, windows_of(lengths, config.which, held_out=config.held_out), first
            first += len(lengths)


def most_windows(shard: Shard, config: WindowsConfig) -> int:
    """Windows of a shard: never more than this, and often just as many."""
    if config.which == "every":
        return shard.tokens if config.held_out else shard.prefixes
    return 3 * shard.rows if config.held_out else shard.trainable_rows


def means(
    item_vectors: Float32[np.ndarray, "items dimension"], shown: Ragged
) -> Float32[np.ndarray, "windows dimension"]:
    """The mean of the vectors of each window's items; equal windows have equal means.

    Args:
        item_vectors: Row by item id.
        shown: Items of each window, one at least.
    """
    dimension = item_vectors.shape[1]
    found = np.empty((len(shown.lengths), dimension), dtype=np.float32)
    at_once = max(_NUMBERS_AT_ONCE // dimension, 1)
    begin = 0
    while begin < len(found):
        # As many windows as fit, and one at least.
        end = int(np.searchsorted(shown.offsets, shown.offsets[begin] + at_once, "right")) - 1
        end = max(end, begin + 1)
        offsets = shown.offsets[begin : end + 1]
        vectors = item_vectors[shown.values[offsets[0] : offsets[-1]]]
        sums = np.add.reduceat(vectors, offsets[:-1] - offsets[0], axis=0)
        found[begin:end] = sums / np.diff(offsets)[:, None].astype(np.float32)
        begin = end
    return found


def joined(item_texts: pa.Array, shown: Ragged) -> list[str | None]:
    """The texts of each window's items, newest first; None where no item has one.

    Newest first, and not as they came: what the limit of an embedder then cuts off is the oldest,
    whatever its tokenizer, and of a server's tokenizer nothing is known here.

    Args:
        item_texts: Index i holds the text of item i + 1, null for none.
        shown: Items of each window, oldest first.
    """
    distinct, places = np.unique(shown.values, return_inverse=True)
    texts = item_texts.take(pa.array(distinct - 1)).to_pylist()
    found = []
    for begin, end in zip(shown.offsets[:-1], shown.offsets[1:], strict=True):
        newest_first = (texts[place] for place in places[begin:end][::-1])
        found.append(SEPARATOR.join(text for text in newest_first if text) or None)
    return found


def check_rows(
    where: str, table: pa.Table, row: Int64[np.ndarray, " n"], length: Int64[np.ndarray, " n"]
) -> None:
    """Refuses descriptions that are not of these windows, in this order.

    Raises:
        SchemaError: If a row or a length differs.
    """
    rows, lengths = (table.column(name).to_numpy() for name in ("row", "length"))
    if not (np.array_equal(rows, row) and np.array_equal(lengths, length)):
        raise SchemaError(
            f"{where} does not describe the windows of its sequence shard in order; make the "
            "descriptions again with --overwrite"
        )
