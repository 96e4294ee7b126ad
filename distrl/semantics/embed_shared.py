"""What all actors of a run read: made by one task each, and then in every node's shared memory."""

from typing import Any

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Float32

from distrl.data.side_tables import Part, SideManifest, read_part
from distrl.data.store import read_item_ids
from distrl.errors import SchemaError
from distrl.schema import Manifest
from distrl.semantics.embed_config import EmbedConfig
from distrl.semantics.item_texts import texts_of_descriptions, texts_of_lines


@ray.remote(num_returns=2)
def item_texts(
    config: EmbedConfig, manifest: Manifest, descriptions: SideManifest | None
) -> tuple[int, pa.Array]:
    """How many items have no text, and the text of each: index i holds that of item i + 1.

    Raises:
        SchemaError: If the texts are torn, or some are missing and may not be.
        StorageError: If they cannot be read.
    """
    if descriptions is not None:
        texts = texts_of_descriptions(descriptions, config.store_uri, manifest)
        where = f"descriptions={config.descriptions}"
    else:
        assert config.item_text_uri is not None, "the config has one or the other"
        texts = texts_of_lines(config.item_text_uri, config.store_uri, manifest)
        where = f"item_text_uri={config.item_text_uri}"
    if texts.null_count and config.missing == "error":
        own = read_item_ids(config.store_uri, manifest)
        first = own[int(np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False))[0])].as_py()
        raise SchemaError(
            f"{where} has no text for {texts.null_count:,} of {manifest.num_items:,} items of "
            f"{config.store_uri}, such as item {first!r}: give them one, or set missing=zero for "
            "vectors of zeros"
        )
    return texts.null_count, texts


@ray.remote
def item_vectors(store_uri: str, parts: tuple[Part, ...], num_items: int, dimension: int) -> Any:  # noqa: ANN401
    """Vectors of all items, row by item id; row 0, of padding, is zeros.

    Raises:
        SchemaError: If a part changed since it was written.
        StorageError: If it cannot be read.
    """
    found: Float32[np.ndarray, "items dimension"]
    found = np.zeros((num_items + 1, dimension), dtype=np.float32)
    for part in parts:
        table = read_part(store_uri, part).read(columns=["item_id", "vector"])
        vectors = table.column("vector").combine_chunks().flatten().to_numpy()
        found[table.column("item_id").to_numpy()] = vectors.reshape(-1, dimension)
    return found
