import gzip
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.data.events import EventCleaner, ReadCounts, parse_moment
from distrl.data.prepare_config import FiltersConfig, SourceConfig
from distrl.data.source_files import file_format, find_files, reading_units
from distrl.data.source_schema import learn_columns
from distrl.errors import ConfigError, SchemaError, StorageError

ROWS = [
    {"user": "u1", "item": 7, "timestamp": 3, "rating": 4.0, "event_type": "buy"},
    {"user": "u2", "item": 8, "timestamp": 1, "rating": 2.0, "event_type": "view"},
    {"user": "u1", "item": 9, "timestamp": 2, "rating": None, "event_type": "buy"},
]
CLEAN = [
    {"user": "u1", "item": 7, "timestamp": 3000},
    {"user": "u2", "item": 8, "timestamp": 1000},
    {"user": "u1", "item": 9, "timestamp": 2000},
]


def clean(uri, counts=None, filters=None, **source):
    """All clean events of a source, as rows."""
    config = SourceConfig(uri=str(uri), **source)
    files = find_files(config)
    columns = learn_columns(config, files, file_format(config, files))
    cleaner = EventCleaner(config, filters or FiltersConfig(), columns)
    counts = ReadCounts() if counts is None else counts
    units = reading_units(files, columns.format, columns.inflation, 1 << 20)
    tables = [table for unit in units for part in unit for table in cleaner.clean(part, counts)]
    return pa.concat_tables(tables).to_pylist()


def write(path, rows=ROWS):
    """Rows in the format of the file's extension."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0])]
        lines += [mark.join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("extension", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format_gives_the_same_events(tmp_path, extension):
    assert clean(write(tmp_path / f"events.{extension}")) == CLEAN


@pytest.mark.parametrize("extension", ["parquet", "csv", "tsv", "jsonl"])
def test_filters_count_what_each_leaves(tmp_path, extension):
    counts = ReadCounts()
    filters = FiltersConfig(event_types=("buy",), min_rating=3, time_from=0, time_to=3)
    file = write(tmp_path / f"events.{extension}")
    assert clean(file, counts, filters, event_type="event_type", rating="rating") == []
    left = (counts.read, counts.after_event_types, counts.after_rating, counts.after_time)
    # The third row has no rating, the first lies at the end of the time range.
    assert left == (3, 2, 1, 0)


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_a_time_range_includes_its_start_and_not_its_end(tmp_path, extension):
    file = write(tmp_path / f"events.{extension}")
    filters = FiltersConfig(time_from="1970-01-01T00:00:01Z", time_to="1970-01-01T01:00:03+01:00")
    assert clean(file, filters=filters) == CLEAN[1:]


def test_sequences_keep_users_lines_and_order(tmp_path):
    file = tmp_path / "sequences.txt"
    file.write_text("3 10 11 10\n\n1 12\n3\t9 \r\n")
    rows = clean(file, format="sequences")
    assert [(row["user"], row["item"]) for row in rows] == [
        (3, 10),
        (3, 11),
        (3, 10),
        (1, 12),
        (3, 9),
    ]


def test_ids_with_leading_zeros_are_strings(tmp_path):
    file = tmp_path / "events.csv"
    file.write_text("user,item,timestamp\n007,12,1\n8,-3,2\n")
    assert clean(file)[0] == {"user": "007", "item": 12, "timestamp": 1000}
    assert clean(file, user_type="int64")[0]["user"] == 7
    assert clean(file, item_type="string")[1]["item"] == "-3"


def test_a_file_without_header_takes_its_names_from_the_config(tmp_path):
    file = tmp_path / "u.data"
    file.write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    names = ("user", "item", "rating", "timestamp")
    assert clean(file, format="tsv", column_names=names)[0] == {
        "user": 196,
        "item": 242,
        "timestamp": 881250949000,
    }


def test_compressed_text_is_unpacked(tmp_path):
    plain = write(tmp_path / "plain.csv")
    packed = tmp_path / "events.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert clean(packed) == CLEAN


@pytest.mark.parametrize(
    ("written", "unit", "milliseconds"),
    [
        ("2", "s", 2000),
        ("2.0015", "s", 2002),
        ("-1", "s", -1000),
        ("1700000000123", "ms", 1700000000123),
        ("1700000000123456", "us", 1700000000123),
        ("1700000000123456789", "ns", 1700000000123),
        ("2014-07-01", "s", 1404172800000),
        ("2014-07-01T02:00:00.5+02:00", "s", 1404172800500),
        ("2014-07-01 00:00:00Z", "ms", 1404172800000),
    ],
)
def test_times_become_milliseconds(tmp_path, written, unit, milliseconds):
    file = tmp_path / "events.csv"
    file.write_text(f"user,item,timestamp\n1,2,{written}\n")
    assert clean(file, timestamp_unit=unit)[0]["timestamp"] == milliseconds
    if unit != "ns":
        value = written if "-0" in written else float(written)
        rows = [{"user": 1, "item": 2, "timestamp": value}]
        file = write(tmp_path / "events.jsonl", rows)
        assert clean(file, timestamp_unit=unit)[0]["timestamp"] == milliseconds


@pytest.mark.parametrize(
    "type_",
    [pa.timestamp("us"), pa.timestamp("ns", "Europe/Berlin"), pa.timestamp("s"), pa.date32()],
)
def test_timestamp_types_become_milliseconds(tmp_path, type_):
    times = pa.array([datetime(2014, 7, 1, tzinfo=UTC)], pa.timestamp("us", "UTC"))
    zoned = pa.types.is_timestamp(type_) and type_.tz is not None
    times = times.cast(type_) if zoned else times.cast(pa.timestamp("us")).cast(type_)
    pq.write_table(
        pa.table({"user": [1], "item": [1], "timestamp": times}), tmp_path / "events.parquet"
    )
    assert clean(tmp_path / "events.parquet")[0]["timestamp"] == 1404172800000


def test_categories_and_small_integers_are_ids(tmp_path):
    table = pa.table(
        {
            "user": pa.array(["a", "b"]).dictionary_encode(),
            "item": pa.array([1, 2], pa.uint8()),
            "timestamp": pa.array([1.0, 2.0], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "events.parquet")
    assert clean(tmp_path / "events.parquet")[1] == {"user": "b", "item": 2, "timestamp": 2000}


def test_rows_without_a_value_are_counted_with_an_example(tmp_path):
    counts = ReadCounts()
    file = tmp_path / "events.csv"
    file.write_text('user,item,timestamp\na,1,1\n"",2,2\nc,,\nd,4,nan\n')
    assert [row["user"] for row in clean(file, counts)] == ["a"]
    assert counts.nulls == {"user": 1, "item": 1, "timestamp": 2}
    assert counts.null_example == f"{file} row 2 (user=None, item=2, timestamp=2000)"


def test_an_event_that_does_not_pass_needs_no_item(tmp_path):
    counts, file = ReadCounts(), tmp_path / "events.jsonl"
    file.write_text(
        '{"user": 1, "timestamp": 1, "kind": "visit"}\n'
        '{"user": 1, "item": 5, "timestamp": 2, "kind": "buy"}\n'
    )
    filters = FiltersConfig(event_types=("buy",))
    assert [row["item"] for row in clean(file, counts, filters, event_type="kind")] == [5]
    assert counts.nulls == {}


@pytest.mark.parametrize("extension", ["parquet", "csv", "tsv", "jsonl"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, extension):
    file = write(tmp_path / f"events.{extension}")
    said = r"has no column 'itm' \(source\.item\); it has user, item, timestamp, rating"
    with pytest.raises(SchemaError, match=said):
        clean(file, item="itm")


@pytest.mark.parametrize("extension", ["parquet", "csv"])
def test_a_column_missing_from_a_later_file_is_named_with_the_file(tmp_path, extension):
    write(tmp_path / f"a.{extension}")
    write(tmp_path / f"b.{extension}", [{"user": "u", "thing": 1, "timestamp": 1}])
    with pytest.raises(SchemaError, match=rf"b\.{extension} has no column 'item'"):
        clean(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "user,item,timestamp\n1,2,3\n4,5\n", r"a\.csv line 3: 2 fields, 3 expected"),
        (
            "a.csv",
            "user,item,timestamp\n" + "1,2,3\n" * 3000 + "1,x,3\n",
            r"a\.csv line 3002: item='x' is not a 64-bit integer, which the first rows are",
        ),
        (
            "a.csv",
            "user,item,timestamp\n" + "1,2,3\n" * 3000 + "1,2,soon\n",
            r"line 3002: timestamp='soon' is not a number",
        ),
        ("a.csv", "user,item,timestamp\n1,2,soon\n", "'soon' is neither a number nor an ISO 8601"),
        (
            "a.csv",
            "user,item,timestamp\n" + "1,2,2014-07-01\n" * 3000 + "1,2,2014-13-01\n",
            r"a\.csv: column timestamp, row 3001: '2014-13-01' is not an ISO 8601 time",
        ),
        ("a.jsonl", '{"user": 1, "item": 2, "timestamp": 3}\n{"user":\n', r"line 2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", r"line 1 is not a JSON object"),
        (
            "a.jsonl",
            '{"user": 1, "item": 2, "timestamp": 3}\n' * 3000 + '{"user": "x", "item": 2}\n',
            r"line 3001: user='x' is not an integer, which the first rows are",
        ),
        (
            "a.jsonl",
            '{"user": 1, "item": 2, "timestamp": 3}\n' * 3000 + '{"user": 1.5, "item": 2}\n',
            r"line 3001: user=1\.5 is not an integer",
        ),
        ("a.parquet", "PAR1 is not enough", r"a\.parquet is not a readable Parquet file"),
        ("a.csv", "user,item,timestamp\n1,2,1700000000000\n", "is source.timestamp_unit right"),
    ],
)
def test_bad_rows_are_found_with_file_and_place(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(SchemaError, match=said):
        clean(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1 2 3\n4\n", "line 2 has a user and no item"),
        ("1 2\n" * 3000 + "x 2\n", "line 3001: user 'x' is not a 64-bit integer"),
        ("1 2\n" * 3000 + "1 2 y\n", "line 3001: item 'y' is not a 64-bit integer"),
    ],
)
def test_bad_sequences_are_found_with_their_line(tmp_path, content, said):
    (tmp_path / "s.txt").write_text(content)
    with pytest.raises(SchemaError, match=said):
        clean(tmp_path / "s.txt", format="sequences")


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("user", [1.5], "column user is double; ids are integers or strings"),
        ("item", [[1]], "column item is list"),
        ("timestamp", [[1]], "column timestamp is list.*; a time is a number, a string or a"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(tmp_path, column, values, said):
    table = {"user": [1], "item": [1], "timestamp": [1]} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "events.parquet")
    with pytest.raises(SchemaError, match=said):
        clean(tmp_path / "events.parquet")


def test_a_later_file_of_another_type_is_named(tmp_path):
    write(tmp_path / "a.parquet", [{"user": 1, "item": 1, "timestamp": 1}])
    write(tmp_path / "b.parquet", [{"user": "x", "item": 1, "timestamp": 1}])
    with pytest.raises(SchemaError, match=r"b\.parquet: column user is string, expected int64"):
        clean(tmp_path)


@pytest.fixture
def ordinary_user():
    """Runs a test as someone whom file modes bind, where the suite runs as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_a_file_that_may_not_be_read_is_named(ordinary_user):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        file = write(Path(folder) / "events.csv")
        file.chmod(0)
        with pytest.raises(StorageError, match=r"cannot read .*events\.csv: permission denied to"):
            clean(file)


def test_an_empty_input_is_named(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(SchemaError, match="all 1 files are empty"):
        clean(tmp_path / "a.csv")


def test_an_empty_file_among_others_is_no_error(tmp_path):
    (tmp_path / "0.csv").touch()
    write(tmp_path / "1.csv")
    assert clean(tmp_path) == CLEAN


def test_a_moment_that_is_no_time_is_named():
    with pytest.raises(ConfigError, match=r"filters\.time_to='July' is not ISO 8601"):
        parse_moment("July", "s", "filters.time_to")
    assert parse_moment(1500, "ms", "filters.time_to") == 1500
    assert parse_moment("1970-01-02", "s", "filters.time_to") == 86_400_000
