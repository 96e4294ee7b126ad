from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.data.prepare_config import SourceConfig
from distrl.data.source_files import (
    ReadPart,
    SourceFile,
    file_format,
    find_files,
    fingerprint,
    reading_units,
)
from distrl.errors import ConfigError, StorageError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.csv", "a/2.csv", "a/10.csv", "_SUCCESS", "notes.txt", "c.csv.gz", ".b.csv.crc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a/10.csv", "a/2.csv", "b.csv", "c.csv.gz"]),
        ("/b.csv", ["b.csv"]),
        ("/*.csv", ["b.csv"]),
        ("/*", [".b.csv.crc", "_SUCCESS", "b.csv", "c.csv.gz", "notes.txt"]),
        ("/**/*.csv", ["a/10.csv", "a/2.csv", "b.csv"]),
        ("/a/?.csv", ["a/2.csv"]),
        ("/[a-b]*/*.csv", ["a/10.csv", "a/2.csv"]),
    ],
)
def test_files_are_found_in_the_order_of_their_names(folder, pattern, found):
    files = find_files(SourceConfig(uri=f"{folder}{pattern}"))
    assert [str(Path(file.uri).relative_to(folder)) for file in files] == found
    assert all(file.size == 1 and file.modified for file in files)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("/missing.csv", r"missing\.csv does not exist"),
        ("/missing/*.csv", r"missing does not exist"),
        ("/*.parquet", "matches no file"),
    ],
)
def test_nothing_found_is_named(folder, uri, said):
    with pytest.raises(StorageError, match=said):
        find_files(SourceConfig(uri=f"{folder}{uri}"))


def test_the_format_goes_by_the_extension_unless_given():
    files = [SourceFile("a.csv", 1, ""), SourceFile("b.csv.gz", 1, "")]
    assert file_format(SourceConfig(uri="x"), files) == "csv"
    assert file_format(SourceConfig(uri="x", format="tsv"), files) == "tsv"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.txt"], r"cannot tell the format of a\.txt: say parquet, csv, tsv, jsonl or seq"),
        (["a.csv", "b.jsonl"], r"mixes formats, as in a\.csv and b\.jsonl"),
    ],
)
def test_a_format_that_is_not_clear_is_named(names, said):
    files = [SourceFile(name, 1, "") for name in names]
    with pytest.raises(ConfigError, match=said):
        file_format(SourceConfig(uri="x"), files)


def test_small_files_share_a_piece_of_work_and_keep_their_order():
    sizes = [40, 40, 40, 200, 10, 10]
    files = [SourceFile(f"{number}.csv", size, "") for number, size in enumerate(sizes)]
    units = reading_units(files, "csv", 0.5, 50)
    sizes = [[part.file.size for part in unit] for unit in units]
    assert sizes == [[40, 40], [40], [200], [10, 10]]


def test_a_large_parquet_file_is_cut_between_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(1000))}), path, row_group_size=100)
    (file,) = find_files(SourceConfig(uri=str(path)))
    units = reading_units([file, file], "parquet", 4.0, file.size)
    parts = [part for unit in units for part in unit]
    assert all(isinstance(part, ReadPart) for part in parts)
    assert parts[:4] == [
        ReadPart(file, (0, 1, 2), 0),
        ReadPart(file, (3, 4, 5), 300),
        ReadPart(file, (6, 7, 8), 600),
        ReadPart(file, (9,), 900),
    ]


def test_a_fingerprint_sees_names_sizes_and_times():
    file = SourceFile("a.csv", 3, "2020")
    others = [SourceFile("b.csv", 3, "2020"), SourceFile("a.csv", 4, "2020")]
    others.append(SourceFile("a.csv", 3, "2021"))
    prints = {str(fingerprint([one])["sha256"]) for one in (file, *others)}
    assert len(prints) == 4
