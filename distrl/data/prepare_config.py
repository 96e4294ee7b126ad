"""What to make a sequence store from, and how."""

from datetime import date
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, model_validator

from distrl.schema import Config

FileFormat = Literal["parquet", "csv", "tsv", "jsonl", "sequences"]
IdType = Literal["auto", "int64", "string"]


def _iso(value: object) -> object:
    # YAML reads an unquoted 2014-07-01 as a date.
    return value.isoformat() if isinstance(value, date) else value


Moment = Annotated[str | int | float, BeforeValidator(_iso)]


class SourceConfig(Config):
    """The raw events: where they lie and what their columns are called."""

    uri: str
    """A file, a folder, or a glob such as s3://bucket/events/*.parquet. Files are read in the
    order of their names, which decides between events of the same time."""
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl", "sequences"] = "auto"
    """auto goes by the extension; sequences is `user item item ...` a line, oldest first."""
    user: str = "user"
    """Column of the user's id: an integer or a string."""
    item: str = "item"
    """Column of the item's id: an integer or a string."""
    timestamp: str | None = "timestamp"
    """Column of the time: a number, an ISO 8601 string (UTC unless it says otherwise) or a
    timestamp. None: the order of the input is the order of the events."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "s"
    """What a number in the time column counts since 1970. The store always holds milliseconds."""
    event_type: str | None = None
    """Column of the kind of event; needed by filters.event_types."""
    rating: str | None = None
    """Column of a number that says how much the user liked the item; for filters.min_rating."""
    column_names: tuple[str, ...] | None = None
    """Names of the columns of CSV or TSV files without a header line."""
    user_type: IdType = "auto"
    """auto looks at the first rows: integers written without leading zeros are int64."""
    item_type: IdType = "auto"
    """As user_type."""


class FiltersConfig(Config):
    """Which events count. An event without the value that a filter looks at does not pass it."""

    event_types: tuple[str, ...] | None = None
    min_rating: float | None = None
    time_from: Moment | None = None
    """First moment that counts: an ISO 8601 string, or a number in source.timestamp_unit."""
    time_to: Moment | None = None
    """First moment that does not count any more, as time_from."""


class KCoreConfig(Config):
    """Users and items with few interactions are dropped; a round drops items, then users."""

    min_user_interactions: PositiveInt = 1
    min_item_interactions: PositiveInt = 1
    rounds: PositiveInt | None = None
    """None goes on until no user and no item falls below its minimum any more."""


class PrepareConfig(Config):
    """Raw events to a sequence store."""

    store_uri: str
    """Folder of the store: a path, or s3://bucket/prefix, that every node reaches."""
    source: SourceConfig
    filters: FiltersConfig = FiltersConfig()
    deduplicate: Literal["none", "first", "last"] = "none"
    """Which interaction stays where a user meets an item repeatedly; after the filters."""
    max_user_interactions: PositiveInt | None = None
    """The newest so many of each user are kept, before k_core counts; None keeps all. An account
    with a million events, a crawler say, is otherwise one sample, and one step has all of it."""
    k_core: KCoreConfig = KCoreConfig()
    noise_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Random items put into each sequence, but not among its two held-out items, as a share of its
    items: for studies of robustness. Item counts and filters stay those of the log."""
    noise_seed: NonNegativeInt = 0
    """Of those items."""
    num_shards: PositiveInt | None = None
    """Files that the users are spread over; None makes as many as shard_mb asks for."""
    shard_mb: PositiveInt = 64
    """Size of a shard in memory where num_shards is None, at 4 bytes an item and 8 a timestamp."""
    row_group_rows: PositiveInt = 4096
    """Most users in a Parquet row group, which is what a reader holds at once."""
    row_group_mb: PositiveInt = 16
    """Most MB in memory in a row group, unless a single user has more."""
    items_per_part: PositiveInt = 1_000_000
    """Items in one file of the item table."""
    seed: NonNegativeInt = 0
    """Of the hash that spreads the users over shards and shuffles them within."""
    num_cpus: PositiveInt | None = None
    """Tasks of one CPU each that run at a time; None: as many as the cluster has CPUs."""
    chunk_mb: PositiveInt = 64
    """Rows that a reading task hands on at a time, in MB, and it holds up to twice as many; a
    quarter of a MB a partition where that is more, so that of very large logs what goes from one to
    another is not all crumbs."""
    partition_mb: PositiveInt = 256
    """Rows of one partition, in MB; a task needs up to four times this at its peak."""
    num_partitions: PositiveInt | None = None
    """Groups of users that are worked on at a time; None derives it from the input's size and
    partition_mb. It changes memory and speed, never the result."""

    @model_validator(mode="after")
    def _combinations(self) -> "PrepareConfig":
        source, filters = self.source, self.filters
        if filters.event_types is not None and source.event_type is None:
            raise ValueError("filters.event_types needs source.event_type, the column to look at")
        if filters.min_rating is not None and source.rating is None:
            raise ValueError("filters.min_rating needs source.rating, the column to look at")
        bounded = filters.time_from is not None or filters.time_to is not None
        if bounded and (source.timestamp is None or source.format == "sequences"):
            raise ValueError("filters.time_from and time_to need source.timestamp, a time column")
        if source.column_names is not None and source.format not in ("csv", "tsv"):
            raise ValueError("source.column_names is for source.format csv or tsv")
        most, least = self.max_user_interactions, self.k_core.min_user_interactions
        if most is not None and most < least:
            raise ValueError(
                f"max_user_interactions={most} is below k_core.min_user_interactions={least}: no "
                "user would be left"
            )
        return self

    def decisive(self) -> dict[str, object]:
        """The settings that decide the store's content: not where it lies, nor how it is made."""
        how = {"store_uri", "num_cpus", "chunk_mb", "partition_mb", "num_partitions"}
        if self.noise_share == 0:
            how |= {"noise_share", "noise_seed"}
        if self.max_user_interactions is None:
            how |= {"max_user_interactions"}
        return self.model_dump(mode="json", exclude=how)
