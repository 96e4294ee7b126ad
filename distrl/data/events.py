"""Raw tables to clean events: one type of id, times in milliseconds, filters, nulls counted."""
# Arrow makes its compute functions when it is imported, where pyright cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from distrl.data.event_columns import EventColumns
from distrl.data.event_readers import read_events
from distrl.data.prepare_config import FiltersConfig, SourceConfig
from distrl.data.source_files import ReadPart
from distrl.errors import ConfigError, SchemaError

_LAST_MS = 253_402_300_799_999
"""The end of the year 9999."""
_PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass
class ReadCounts:
    """What became of the rows that were read; adds up over parts."""

    read: int = 0
    after_event_types: int = 0
    after_rating: int = 0
    after_time: int = 0
    nulls: dict[str, int] = field(default_factory=dict)
    """Rows without a value, by role."""
    null_example: str | None = None

    def add(self, other: "ReadCounts") -> None:
        """Adds a later part's counts; the first example stays."""
        self.read += other.read
        self.after_event_types += other.after_event_types
        self.after_rating += other.after_rating
        self.after_time += other.after_time
        for role, count in other.nulls.items():
            self.nulls[role] = self.nulls.get(role, 0) + count
        self.null_example = self.null_example or other.null_example


def parse_moment(value: str | int | float, unit: str, name: str) -> int:
    """A configured moment in milliseconds since 1970.

    Raises:
        ConfigError: If it is a string that is not ISO 8601.
    """
    if not isinstance(value, str):
        return round(value * 1000 / _PER_SECOND[unit])
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(
            f"{name}={value!r} is not ISO 8601, such as 2014-07-01 or 2014-07-01T12:00:00+02:00"
        ) from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


@dataclass(frozen=True)
class EventCleaner:
    """Applies a source's types and filters to its raw tables."""

    source: SourceConfig
    filters: FiltersConfig
    columns: EventColumns

    def clean(self, part: ReadPart, counts: ReadCounts) -> Iterator[pa.Table]:
        """Tables of user, item and, if there is one, timestamp (int64 ms), in order, without nulls.

        Rows without a user, an item or a time are left out and counted.

        Raises:
            SchemaError: If a column is missing or of the wrong type, or a row cannot be parsed.
            StorageError: If the file cannot be read.
        """
        for first_row, raw in read_events(part, self.columns):
            counts.read += raw.num_rows
            rows = pa.array(range(first_row, first_row + raw.num_rows), pa.int64())
            table = self._filter(raw.append_column("row", rows), counts)
            yield self._in_time(self._without_nulls(self._typed(table, part), part, counts), counts)

    def _filter(self, table: pa.Table, counts: ReadCounts) -> pa.Table:
        if self.filters.event_types is not None:
            kinds = table.column("event_type").cast(pa.string())
            table = table.filter(pc.is_in(kinds, pa.array(self.filters.event_types)))
        counts.after_event_types += table.num_rows
        if self.filters.min_rating is not None:
            rating = table.column("rating").cast(pa.float64())
            table = table.filter(pc.greater_equal(rating, self.filters.min_rating))
        counts.after_rating += table.num_rows
        return table

    def _typed(self, table: pa.Table, part: ReadPart) -> pa.Table:
        names = dict(self.columns.names)
        typed = {"row": table.column("row")}
        for role, type_ in (("user", self.columns.user_type), ("item", self.columns.item_type)):
            typed[role] = _as_id(
                table.column(role), type_, f"{part.file.uri}: column {names[role]}"
            )
        if self.columns.time != "none":
            typed["timestamp"] = self._milliseconds(table, part)
        return pa.table(typed)

    def _milliseconds(self, table: pa.Table, part: ReadPart) -> pa.ChunkedArray:
        values, name = table.column("timestamp"), dict(self.columns.names)["timestamp"]
        where = f"{part.file.uri}: column {name}"
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        kind = values.type
        if pa.types.is_null(kind):
            return values.cast(pa.int64())
        if pa.types.is_timestamp(kind):
            times = values.cast(pa.timestamp("ms", tz=kind.tz), safe=False).cast(pa.int64())
        elif pa.types.is_date(kind):
            times = values.cast(pa.timestamp("ms")).cast(pa.int64())
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            times = _parse_iso(values, table.column("row"), where)
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            times = _number_to_ms(values, self.source.timestamp_unit)
        else:
            raise SchemaError(f"{where} is {kind}; a time is a number, a string or a timestamp")
        extreme = pc.max(pc.abs(times)).as_py()
        if extreme is not None and extreme > _LAST_MS:
            raise SchemaError(
                f"{where} has a time beyond the year 9999 when its numbers are read as "
                f"{self.source.timestamp_unit}: is source.timestamp_unit right?"
            )
        return times

    def _without_nulls(self, table: pa.Table, part: ReadPart, counts: ReadCounts) -> pa.Table:
        roles = [name for name in table.column_names if name != "row"]
        if not any(table.column(role).null_count for role in roles):
            return table
        missing = None
        for role in roles:
            null = pc.is_null(table.column(role))
            if number := table.column(role).null_count:
                counts.nulls[role] = counts.nulls.get(role, 0) + number
            missing = null if missing is None else pc.or_(missing, null)
        if counts.null_example is None:
            first = table.filter(missing).slice(0, 1).to_pylist()[0]
            values = ", ".join(f"{role}={first[role]!r}" for role in roles)
            counts.null_example = f"{part.file.uri} row {first['row']} ({values})"
        return table.filter(pc.invert(missing))

    def _in_time(self, table: pa.Table, counts: ReadCounts) -> pa.Table:
        unit, filters = self.source.timestamp_unit, self.filters
        if filters.time_from is not None:
            first = parse_moment(filters.time_from, unit, "filters.time_from")
            table = table.filter(pc.greater_equal(table.column("timestamp"), first))
        if filters.time_to is not None:
            end = parse_moment(filters.time_to, unit, "filters.time_to")
            table = table.filter(pc.less(table.column("timestamp"), end))
        counts.after_time += table.num_rows
        return table.drop_columns("row")


def _as_id(values: pa.ChunkedArray, type_: pa.DataType, where: str) -> pa.ChunkedArray:
    """Ids in their one type; an empty string is no id."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return values.cast(type_)
    integer, wanted_integer = pa.types.is_integer(kind), pa.types.is_integer(type_)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)
    if not (integer or text) or (wanted_integer and not integer):
        raise SchemaError(f"{where} is {kind}, expected {type_} (integers or strings are ids)")
    try:
        ids = values.cast(kind).cast(type_)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{where}: {str(error).splitlines()[0]}") from error
    return ids if integer else pc.if_else(pc.equal(ids, ""), pa.scalar(None, type_), ids)


def _number_to_ms(values: pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    per_second = _PER_SECOND[unit]
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))
        return pc.round(pc.multiply(values, 1000 / per_second)).cast(pa.int64(), safe=False)
    values = values.cast(pa.int64(), safe=False)
    if per_second < 1000:
        # Not the checked product: a nonsense value must reach the check for the year 9999.
        bounded = pc.min_element_wise(pc.max_element_wise(values, -(2**52)), 2**52)
        return pc.if_else(pc.is_null(values), values, pc.multiply(bounded, 1000 // per_second))
    # Arrow divides towards zero, which would join the milliseconds around 1970.
    step = per_second // 1000
    shift = pc.if_else(pc.less(values, 0), step - 1, 0)
    return pc.divide(pc.subtract(values, shift), step)


def _parse_iso(values: pa.ChunkedArray, rows: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """ISO 8601 strings in milliseconds; those without an offset are UTC."""
    values = values.cast(pa.string())
    values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    zoned = pc.match_substring_regex(values, r"(Z|[+-]\d\d:?\d\d)$")
    nothing = pa.scalar(None, pa.string())
    try:
        # Arrow parses strings with an offset and strings without only apart from each other.
        local = pc.if_else(zoned, nothing, values).cast(pa.timestamp("us")).cast(pa.int64())
        there = pc.if_else(zoned, values, nothing).cast(pa.timestamp("us", tz="UTC"))
        return _number_to_ms(pc.coalesce(local, there.cast(pa.int64())), "us")
    except pa.ArrowInvalid as error:
        for value, row in zip(values.to_pylist(), rows.to_pylist(), strict=True):
            try:
                datetime.fromisoformat(value or "1970-01-01")
            except ValueError:
                raise SchemaError(
                    f"{where}, row {row}: {value!r} is not an ISO 8601 time"
                ) from None
        raise SchemaError(f"{where}: {str(error).splitlines()[0]}") from error
