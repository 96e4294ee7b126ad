"""Files anywhere: the one place that knows how a URI becomes a file system.

Local paths and `s3://` go to Arrow's own file systems, everything else to fsspec. Credentials come
from the vendors' own environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
`AWS_ENDPOINT_URL`, or an instance role) and never from a config or a URI.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from distrl.errors import StorageError

_COPY_BYTES = 1 << 22


def is_local(uri: str) -> bool:
    """Whether a URI is a path on this machine."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The URI with a local path made absolute, without a trailing slash."""
    if not is_local(uri):
        return uri.rstrip("/")
    return str(Path(uri.removeprefix("file://")).expanduser().resolve())


def join(uri: str, *names: str) -> str:
    """A place below a URI."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system behind a URI, and the path on it.

    Raises:
        StorageError: If the scheme is unknown or the URI carries credentials.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    parts = urlsplit(uri)
    if parts.username or parts.password:
        raise StorageError(
            f"{parts.scheme}://***@{parts.hostname}{parts.path} carries credentials; put them into "
            "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) instead"
        )
    if parts.scheme in ("s3", "s3a"):
        return _s3(), f"{parts.netloc}{parts.path}".rstrip("/")
    import fsspec  # the long tail of schemes; slow to import, so only when one is met

    try:
        other, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{uri}: no file system for {parts.scheme}://: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(other)), path


def _s3() -> pafs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options = {"connect_timeout": 10, "request_timeout": 60}
    if endpoint is None:
        return pafs.S3FileSystem(region=region, **options)
    # Arrow asks the network for the region of a bucket unless one is given.
    scheme, _, host = endpoint.partition("://")
    return pafs.S3FileSystem(
        endpoint_override=host.rstrip("/"), scheme=scheme, region=region or "us-east-1", **options
    )


def explained(uri: str, verb: str, error: Exception) -> StorageError:
    """One sentence for what a file system said, which for S3 is a paragraph."""
    said = str(error)
    if isinstance(error, FileNotFoundError):
        return StorageError(f"cannot {verb} {uri}: it does not exist")
    if is_local(uri):
        if isinstance(error, PermissionError):
            return StorageError(f"cannot {verb} {uri}: permission denied to user {os.geteuid()}")
    elif isinstance(error, PermissionError) or re.search(
        r"ACCESS_DENIED|403|SignatureDoesNotMatch|InvalidAccessKeyId|Forbidden", said
    ):
        return StorageError(
            f"cannot {verb} {uri}: permission denied; check the credentials in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and what they may do"
        )
    first = said.strip().splitlines()[0] if said.strip() else type(error).__name__
    return StorageError(f"cannot {verb} {uri}: {first}")


def read_bytes(uri: str) -> bytes:
    """The whole content of a small file.

    Raises:
        StorageError: If it is missing, forbidden or unreachable.
    """
    fs, path = filesystem(uri)
    try:
        with fs.open_input_stream(path) as file:
            return file.read()
    except OSError as error:
        raise explained(uri, "read", error) from error


def open_input(uri: str) -> pa.NativeFile:
    """A file opened for reading, with seek; use it in a `with`.

    Raises:
        StorageError: If it is missing, forbidden or unreachable.
    """
    fs, path = filesystem(uri)
    try:
        return fs.open_input_file(path)
    except OSError as error:
        raise explained(uri, "read", error) from error


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a small file whole; a reader sees the old content or the new, never a part.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    fs, path = filesystem(uri)
    try:
        if is_local(uri):
            fs.create_dir(os.path.dirname(path), recursive=True)
            partial = f"{path}.{os.getpid()}.partial"
            Path(partial).write_bytes(content)
            os.replace(partial, path)
        else:
            with fs.open_output_stream(path) as file:
                file.write(content)
    except OSError as error:
        raise explained(uri, "write", error) from error


def digest(file: BinaryIO | pa.NativeFile) -> tuple[str, int]:
    """sha256 in hex of an open file from its beginning, and its size in bytes; it ends rewound."""
    found, size = hashlib.sha256(), 0
    file.seek(0)
    while piece := file.read(_COPY_BYTES):
        found.update(piece)
        size += len(piece)
    file.seek(0)
    return found.hexdigest(), size


def write_file(uri: str, path: str) -> None:
    """Copies a file of this machine to a place, a piece at a time; a local one appears whole.

    Raises:
        StorageError: If the place is forbidden, full or unreachable.
    """
    fs, target = filesystem(uri)
    try:
        with Path(path).open("rb") as source:
            if is_local(uri):
                fs.create_dir(os.path.dirname(target), recursive=True)
                partial = f"{target}.{os.getpid()}.partial"
                with Path(partial).open("wb") as file:
                    shutil.copyfileobj(source, file, _COPY_BYTES)
                os.replace(partial, target)
            else:
                with fs.open_output_stream(target) as file:
                    while piece := source.read(_COPY_BYTES):
                        file.write(piece)
    except OSError as error:
        raise explained(uri, "write", error) from error


def exists(uri: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: If the answer cannot be had: forbidden or unreachable.
    """
    fs, path = filesystem(uri)
    try:
        return fs.get_file_info(path).type != pafs.FileType.NotFound
    except OSError as error:
        raise explained(uri, "look at", error) from error


def listing(uri: str) -> list[pafs.FileInfo]:
    """Files and folders directly below a URI, by name; empty where nothing is.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    fs, path = filesystem(uri)
    try:
        found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise explained(uri, "list", error) from error
    return sorted(found, key=lambda info: info.base_name)


def delete(uri: str) -> None:
    """Removes a file, or a folder with all below it; nothing happens where nothing is.

    Raises:
        StorageError: If the place is forbidden or unreachable.
    """
    fs, path = filesystem(uri)
    try:
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)
    except OSError as error:
        raise explained(uri, "delete", error) from error


def check_writable(uri: str) -> None:
    """Proves on the driver that a place can be written, before any worker needs it.

    Raises:
        StorageError: If it cannot.
    """
    probe = join(uri, f".write-check-{os.getpid()}")
    write_bytes(probe, b"distrl")
    delete(probe)
