"""How a store becomes batches."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distrl.schema import Config

Share = Annotated[float, Ge(0), Lt(1)]
Operation = Literal["crop", "mask", "reorder", "substitute"]


class AugmentConfig(Config):
    """The random views of a sequence; defaults are the MCLRec authors' code."""

    operations: tuple[Operation, ...] = ("crop", "mask", "reorder")
    """What a view may be; each view is one operation. substitute needs a store that
    jobs/correlate.py has been run on."""
    crop_ratio: Share = 0.5
    """Share of the items that crop removes; what stays is one piece of at least one item."""
    mask_ratio: Share = 0.5
    """Share of the items that mask hides."""
    reorder_ratio: Annotated[float, Ge(0), Le(1)] = 0.8
    """Share of the items, in one piece, that reorder shuffles."""
    substitute_ratio: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the items that substitute replaces by correlated ones, rounded down, but one at
    least. CoSeRec's (arXiv:2108.06479) code has 0.3 in the classes that draw operations, 0.1 on its
    command line and 0.05 in its run on Beauty."""
    substitute_among: PositiveInt = 1
    """A replaced item becomes one of so many that are most correlated with it; CoSeRec takes the
    first."""
    distinct: bool = True
    """The two views of a pair are different operations (MCLRec's code), or drawn with replacement
    (CL4SRec's paper)."""
    mask_with: Literal["pad", "token"] = "pad"
    """A hidden item becomes PAD, which attention cannot see (MCLRec's code), or a mask token with
    a vector of its own (the classical mask)."""

    semantic_share: Share = 0.2
    """Share of the items that a semantic view replaces by ones with a like text; only for methods
    that take such views."""
    semantic_draw: Literal["each", "share"] = "each"
    """each: every item is replaced with that probability (SRA-CL's code), so that a short prefix
    often stays as it is. share: so many of a prefix are, rounded down, but one at least (paper)."""

    @model_validator(mode="after")
    def _enough_operations(self) -> "AugmentConfig":
        if len(set(self.operations)) != len(self.operations) or not self.operations:
            raise ValueError(f"operations={list(self.operations)} is empty or repeats one")
        if self.distinct and len(self.operations) < 2:
            raise ValueError(
                f"distinct views need two operations, operations={list(self.operations)} has one; "
                "add one or set distinct=false"
            )
        return self


class DataConfig(Config):
    """What is read, in which order, and what a batch is made of."""

    store_uri: str
    """A folder that jobs/prepare.py wrote."""
    batch_size: PositiveInt = 256
    """Samples an optimizer step over all workers: users, or prefixes in the papers' protocol."""
    max_len: PositiveInt = 50
    """Items of a sequence that the encoder sees at most."""
    samples: Literal["all_positions", "prefix"] = "all_positions"
    """all_positions: a sample is a user, with a target at every position. prefix: a sample is a
    prefix with one target, as in the papers."""
    long_sequences: Literal["windows", "last"] = "windows"
    """Of users with more than max_len inputs: cut them into windows, so that every target is
    trained on, or keep the last max_len. Only for all_positions."""
    contrasted_prefixes: PositiveInt = 1
    """Prefixes of each user that are contrasted a step: the whole history, then random shorter
    ones. Only for all_positions; a prefix sample contrasts itself."""
    row_length: PositiveInt | None = None
    """Slots of a packed row; None takes max_len."""
    augment: AugmentConfig = AugmentConfig()
    neighbors: str | None = None
    """Which table of neighbors beside the store is read, by the name that jobs/retrieve.py gave it.
    Needed by sracl, refused by methods that take none."""
    num_neighbors: PositiveInt = 10
    """Neighbors of a prefix, and of an item, that are taken: the nearest so many."""
    item_text_uri: str | None = None
    """JSON lines with `item`, the caller's own id, and `title` or `text`: what items are called in
    examples for people. Nothing is trained on it."""
    verify_checksums: bool = True
    """Compare each shard, and its neighbors, with their sha256 when they are first read; costs one
    more read of them."""
    read_tasks: PositiveInt = 1
    """Shards that are read at the same time."""
    read_cpus: PositiveFloat = 0.5
    """CPUs that Ray reserves for each of them."""
    read_ahead_bytes: PositiveInt = 256 * 2**20
    """Object-store memory that the stream may fill ahead of training, over the whole cluster."""
    prefetch_batches: PositiveInt = 4
    """Batches that each worker has ready."""
    wait_warning_share: NonNegativeFloat = 0.05
    """Share of time waiting for data above which the closing lines say so."""

    @model_validator(mode="after")
    def _rows_hold_a_sequence(self) -> "DataConfig":
        if self.row_length is not None and self.row_length < self.max_len:
            raise ValueError(f"row_length={self.row_length} is below max_len={self.max_len}")
        return self

    @property
    def slots(self) -> int:
        """Slots of a packed row."""
        return self.row_length or self.max_len
