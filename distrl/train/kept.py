"""The checkpoints of a run in one process: the latest, the best, and every validation.

::

    <folder>/validations.json      written last: names the checkpoints that count
    <folder>/checkpoint-<number>/  as `distrl.train.state` writes it

A process may die at any moment: what `validations.json` does not name is not there.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from distrl.errors import CheckpointError
from distrl.storage import delete, exists, explained, filesystem, is_local, join
from distrl.storage import read_bytes as read
from distrl.storage import write_bytes as write

INDEX = "validations.json"


@dataclass(slots=True)
class KeptCheckpoints:
    """The folder of a run, local or not."""

    uri: str
    validations: list[dict[str, Any]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """What the best is chosen by, one for each validation; the first of equals is the best."""

    @classmethod
    def of(cls, uri: str) -> "KeptCheckpoints":
        """What a folder holds; nothing where it does not exist.

        Raises:
            CheckpointError: If its index is torn.
            StorageError: If it cannot be read.
        """
        index = join(uri, INDEX)
        if not exists(index):
            return cls(uri)
        try:
            found = json.loads(read(index))
            return cls(uri, found["validations"], found["scores"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is torn: {error!r}") from error

    @property
    def latest(self) -> str | None:
        """Name of the checkpoint to go on from."""
        return _name(len(self.scores) - 1) if self.scores else None

    @property
    def best_number(self) -> int:
        """Index of the best validation."""
        return self.scores.index(max(self.scores))

    @property
    def best(self) -> str | None:
        """Name of the checkpoint of the best validation."""
        return _name(self.best_number) if self.scores else None

    def add(self, folder: Path, validation: dict[str, Any], score: float) -> None:
        """Takes in a checkpoint that lies on this machine, and drops those that count no more.

        Raises:
            StorageError: If the place cannot be written.
        """
        before = {self.latest, self.best}
        name = _name(len(self.scores))
        _copy(str(folder), join(self.uri, name))
        self.validations.append(validation)
        self.scores.append(score)
        index = {"validations": self.validations, "scores": self.scores}
        write(join(self.uri, INDEX), json.dumps(index, indent=1).encode())
        for old in before - {self.latest, self.best, None}:
            delete(join(self.uri, str(old)))

    @contextmanager
    def files(self, name: str) -> Iterator[Path]:
        """The folder of a checkpoint on this machine: its own, or a copy.

        Raises:
            StorageError: If it cannot be read.
        """
        if is_local(self.uri):
            yield Path(self.uri, name)
            return
        with tempfile.TemporaryDirectory(prefix="distrl-checkpoint-") as copy:
            _copy(join(self.uri, name), copy)
            yield Path(copy)


def _name(number: int) -> str:
    return f"checkpoint-{number:06d}"


def _copy(source_uri: str, target_uri: str) -> None:
    """All files of a folder, over whatever an interrupted copy left."""
    (source, from_path), (target, to_path) = filesystem(source_uri), filesystem(target_uri)
    try:
        target.create_dir(to_path, recursive=True)
        pafs.copy_files(from_path, to_path, source_filesystem=source, destination_filesystem=target)
    except OSError as error:
        raise explained(target_uri, "write", error) from error
