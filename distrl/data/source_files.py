"""The files that hold the raw events: found, named, sized, and cut into pieces of work."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from distrl import storage
from distrl.data.prepare_config import FileFormat, SourceConfig
from distrl.errors import ConfigError, SchemaError, StorageError

_EXTENSIONS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_LISTED_FILES = 1000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file."""

    uri: str
    """Where it is, for messages and for opening it."""
    size: int
    """Bytes."""
    modified: str
    """When it was written, ISO 8601; empty where the file system does not say."""

    def to_dict(self) -> dict[str, object]:
        """What the manifest keeps of it."""
        return {"uri": self.uri, "size": self.size, "modified": self.modified}


@dataclass(frozen=True, slots=True)
class ReadPart:
    """A file, or some of its row groups."""

    file: SourceFile
    row_groups: tuple[int, ...] | None = None
    """Of a Parquet file; None is all."""
    first_row: int = 0
    """Number of the first of these rows in the file."""


def find_files(source: SourceConfig) -> list[SourceFile]:
    """The input files, in the order of their names.

    Raises:
        StorageError: If nothing is there or it cannot be listed.
    """
    base, pattern = _split_glob(source.uri)
    fs, path = storage.filesystem(base)
    prefix = "" if storage.is_local(base) else f"{base.split('://', 1)[0]}://"
    try:
        top = fs.get_file_info(path)
        if top.type == pafs.FileType.File and pattern is None:
            return [_source_file(prefix, top)]
        found = (
            fs.get_file_info(pafs.FileSelector(path, recursive=True))
            if top.type == pafs.FileType.Directory
            else []
        )
    except OSError as error:
        raise storage.explained(source.uri, "list", error) from error
    if top.type == pafs.FileType.NotFound:
        raise StorageError(f"cannot read source.uri={source.uri}: {base} does not exist")
    keep = _folder_filter(source) if pattern is None else pattern.fullmatch
    files = [info for info in found if info.is_file and keep(info.path[len(path) :].strip("/"))]
    if not files:
        raise StorageError(f"source.uri={source.uri} matches no file")
    return [_source_file(prefix, info) for info in sorted(files, key=lambda info: info.path)]


def _split_glob(uri: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder before the first wildcard, and what the paths below it must match."""
    magic = re.search(r"[*?\[]", uri)
    if magic is None:
        return uri, None
    base, _, pattern = uri[: magic.start()].rpartition("/")
    pattern += uri[magic.start() :]
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = "".join(
        parts.get(token) or (token.replace("[!", "[^") if token[0] == "[" else re.escape(token))
        for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    )
    return base or ("/" if uri.startswith("/") else "."), re.compile(translated)


def _folder_filter(source: SourceConfig):  # noqa: ANN202
    def keep(relative: str) -> bool:
        # Spark, Hadoop and friends leave _SUCCESS and .crc files beside their output.
        if any(part.startswith(("_", ".")) for part in relative.split("/")):
            return False
        return source.format != "auto" or _extension(relative) in _EXTENSIONS

    return keep


def _source_file(prefix: str, info: pafs.FileInfo) -> SourceFile:
    modified = info.mtime.isoformat() if info.mtime_ns is not None else ""
    # Some file systems of fsspec, such as HTTP's, keep the scheme in their paths.
    uri = info.path if "://" in info.path else f"{prefix}{info.path}"
    return SourceFile(uri, info.size, modified)


def _extension(name: str) -> str:
    path = PurePosixPath(name)
    return (PurePosixPath(path.stem) if path.suffix in _COMPRESSIONS else path).suffix.lower()


def file_format(source: SourceConfig, files: Sequence[SourceFile]) -> FileFormat:
    """The one format of all input files.

    Raises:
        ConfigError: If the extensions are to tell, and say nothing or differ.
    """
    if source.format != "auto":
        return source.format
    formats = {_extension(file.uri): file.uri for file in files}
    unknown = [uri for extension, uri in formats.items() if extension not in _EXTENSIONS]
    if unknown:
        raise ConfigError(
            f"source.format=auto cannot tell the format of {unknown[0]}: say parquet, csv, tsv, "
            "jsonl or sequences"
        )
    if len({_EXTENSIONS[extension] for extension in formats}) > 1:
        raise ConfigError(
            f"source.uri={source.uri} mixes formats, as in {' and '.join(formats.values())}: "
            "narrow the glob to one of them"
        )
    return _EXTENSIONS[next(iter(formats))]


def fingerprint(files: Sequence[SourceFile]) -> dict[str, object]:
    """What tells these inputs from others: names, sizes and times; whole for up to 1000 files."""
    entries = [file.to_dict() for file in files]
    return {
        "num_files": len(files),
        "bytes": sum(file.size for file in files),
        "sha256": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest(),
        "files": entries[:_LISTED_FILES],
    }


def is_packed(file: SourceFile) -> bool:
    """Whether a text file is compressed."""
    return PurePosixPath(file.uri).suffix in _COMPRESSIONS


def reading_units(
    files: Sequence[SourceFile], format_: FileFormat, inflation: float, unit_bytes: int
) -> list[list[ReadPart]]:
    """Pieces of work of about `unit_bytes` in memory each, in the order of the input.

    Small files share a piece, so that no piece falls into crumbs; large Parquet files are cut
    between row groups. A large text file stays one piece, which is read as a stream.

    Args:
        files: The input.
        format_: Of all of them.
        inflation: Bytes of events in memory for a byte of a file.
        unit_bytes: How large a piece is to be.

    Raises:
        StorageError: If a large Parquet file cannot be read.
        SchemaError: If it is not a Parquet file.
    """
    units: list[list[ReadPart]] = [[]]
    room = float(unit_bytes)
    for file in files:
        size = file.size * inflation
        if format_ == "parquet" and size > 2 * unit_bytes:
            units.extend([part] for part in _row_group_parts(file, math.ceil(size / unit_bytes)))
            units.append([])
            room = float(unit_bytes)
            continue
        if size > room and units[-1]:
            units.append([])
            room = float(unit_bytes)
        units[-1].append(ReadPart(file))
        room -= size
    return [unit for unit in units if unit]


def _row_group_parts(file: SourceFile, num_parts: int) -> list[ReadPart]:
    with storage.open_input(file.uri) as opened:
        try:
            metadata = pq.ParquetFile(opened).metadata
        except (pa.ArrowInvalid, OSError) as error:
            raise SchemaError(f"{file.uri} is not a readable Parquet file: {error}") from error
    total, parts, groups = metadata.num_rows, [], []
    first_row = row = 0
    for index in range(metadata.num_row_groups):
        groups.append(index)
        row += metadata.row_group(index).num_rows
        if row - first_row >= total / num_parts or index == metadata.num_row_groups - 1:
            parts.append(ReadPart(file, tuple(groups), first_row))
            groups, first_row = [], row
    return parts
