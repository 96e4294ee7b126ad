"""Words that every floor shares: the config base, and the manifest of a sequence store.

The store is the one contract between jobs::

    <store>/manifest.json             written last, so a store is whole or absent
    <store>/sequences/part-*.parquet  user (string|int64), items list<int32>,
                                      timestamps list<int64> where the log has them
    <store>/items/part-*.parquet      item_id (int32, dense, 1..V by falling count, ascending over
                                      the parts), item (string|int64: the caller's own id), count
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

PAD_ID = 0
"""The item id that is no item. Real items are 1..num_items."""

NUM_HELD_OUT = 2
"""Leave-one-out: the last item of a user is the test target, the one before is for validation."""

MANIFEST_NAME = "manifest.json"

Split = Literal["validation", "test"]


class Config(BaseModel):
    """Base of everything configured: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Shard(Config):
    """One Parquet file of a store."""

    path: str
    """Relative to the store, with forward slashes."""
    rows: PositiveInt
    """Users in a sequence shard, items in an item shard."""
    tokens: NonNegativeInt = 0
    """Interactions in a sequence shard."""
    trainable_rows: NonNegativeInt = 0
    """Users with at least one training target: a length of NUM_HELD_OUT + 2 or more."""
    prefixes: NonNegativeInt = 0
    """Training targets: sum over users of max(length - NUM_HELD_OUT - 1, 0)."""
    bytes: PositiveInt
    """Size of the file."""
    sha256: str
    """Of the file, in hex."""


class Manifest(Config):
    """What a store holds; written last, so its presence means that the store is whole."""

    format_version: Literal[1] = 1
    prepare: dict[str, Any]
    """The resolved prepare config, without credentials."""
    prepare_hash: str
    """sha256 in hex of everything that decides the store's content."""
    num_users: PositiveInt
    num_items: PositiveInt
    num_interactions: PositiveInt
    user_type: Literal["string", "int64"]
    item_type: Literal["string", "int64"]
    has_timestamps: bool
    sequences: tuple[Shard, ...]
    items: tuple[Shard, ...]

    @property
    def num_trainable_rows(self) -> int:
        """Users with at least one training target."""
        return sum(shard.trainable_rows for shard in self.sequences)

    @property
    def num_prefixes(self) -> int:
        """Training targets; the number of samples in the papers' prefix protocol."""
        return sum(shard.prefixes for shard in self.sequences)
