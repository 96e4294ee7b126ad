"""What is known of the items of a store, out of JSON lines keyed by the caller's own ids.

All fields of an item may go into a prompt; an embedder that needs one text an item reads the same
lines with `distrl.semantics.item_texts`.
"""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distrl.data.item_lines import item_lines
from distrl.data.store import read_item_ids
from distrl.errors import SchemaError
from distrl.schema import Manifest
from distrl.semantics.describe_config import ItemTextsConfig
from distrl.semantics.item_replies import stored
from distrl.semantics.item_texts import content_hash

MISSING = "missing"
"""What a field is shown as that an item does not have."""


class ItemRecords(NamedTuple):
    """Three texts an item; index i is of dense item i + 1."""

    shown: pa.Array
    """As histories show it."""
    attributes: pa.Array
    """All that item prompts say of it."""
    raw: pa.Array
    """What stands in for a reply about it."""
    num_missing: int
    """Items without a line."""
    sha256: str
    """Of the file, in hex."""

    def show(self, items: Sequence[int] | np.ndarray) -> list[str]:
        """Items as histories show them.

        Args:
            items: Dense ids.
        """
        return self.shown.take(pa.array(np.asarray(items, dtype=np.int64) - 1)).to_pylist()


def read_item_records(
    config: ItemTextsConfig, window_item: str, store_uri: str, manifest: Manifest
) -> ItemRecords:
    """What prompts say of a store's items; while it is read, 300 bytes an item besides the texts.

    Args:
        config: Where they lie, and which fields are what.
        window_item: Template of an item within a history.
        store_uri: The store.
        manifest: Its manifest.

    Raises:
        SchemaError: If a line is no JSON object, an id comes twice, or no line is of an item of
            the store.
        StorageError: If the file or the store cannot be read.
    """
    ids = [str(item) for item in read_item_ids(store_uri, manifest).to_pylist()]
    places = {item: place for place, item in enumerate(ids)}
    template = string.Template(window_item)
    texts: list[tuple[str, str, str] | None] = [None] * len(ids)
    own = "nothing"
    for _, own, record in item_lines(config.uri, "item_texts.uri", config.id):
        place = places.get(own)
        if place is None:
            continue
        if texts[place] is not None:
            raise SchemaError(
                f"item_texts.uri={config.uri}: {config.id}={own} has more than one line"
            )
        texts[place] = _texts_of(config, template, record)
    num_missing = sum(of_item is None for of_item in texts)
    if num_missing == len(texts):
        raise SchemaError(
            f"item_texts.uri={config.uri} has no line of any item of {store_uri}: its last "
            f"{config.id} is {own}, the store's first item is {ids[0]}; item_texts.id must name "
            "the field with the log's own item ids"
        )
    nothing = _texts_of(config, template, {})
    shown, attributes, raw = zip(*(of_item or nothing for of_item in texts), strict=True)
    return ItemRecords(
        pa.array(shown, pa.large_string()),
        pa.array(attributes, pa.large_string()),
        pa.array(raw, pa.large_string()),
        num_missing,
        content_hash(config.uri),
    )


def rendered(value: Any, max_chars: int) -> str:  # noqa: ANN401
    """A field's value as a prompt shows it; what is not there is `missing`."""
    if isinstance(value, list):
        value = ", ".join(rendered(part, max_chars) for part in value if part not in (None, ""))
    elif isinstance(value, dict):
        value = ", ".join(f"{name} {rendered(part, max_chars)}" for name, part in value.items())
    # NaN is how data frames write what is not there.
    text = "" if value is None or value != value else " ".join(stored(str(value)).split())
    return text[:max_chars] or MISSING


def _texts_of(
    config: ItemTextsConfig, template: string.Template, record: dict[str, Any]
) -> tuple[str, str, str]:
    fields = {name: rendered(value, config.max_chars) for name, value in record.items()}
    titles = (fields.get(name, MISSING) for name in config.title)
    title = next((text for text in titles if text != MISSING), MISSING)
    attributes = "; ".join(
        f"{label}: {fields.get(name, MISSING)}" for label, name in config.attributes.items()
    )
    raw = fields.get(config.text, MISSING)
    shown = template.substitute(title=title, attributes=attributes)
    return shown, attributes, attributes if raw == MISSING else raw
