"""Replies of language models, kept for good under what was asked.

    <replies_uri>/part-*.parquet   key, model, malformed, text, tokens_in, tokens_out

A key is the sha256 of model, messages and parameters, so any number of tables may share the place.
A reply is written within about a second after it came, with those that came by then, as a file of
its own; files below `_WHOLE_BYTES` are merged when a run starts and before it reads. A key that is
there twice, after a run that was killed while it merged, holds the same reply twice. Runs may share
the place at the same time: what another one has merged away is looked for again. They do not see
each other's new replies, so two that ask the same at the same time both pay.

In memory are 30 bytes for each reply that is kept, and the texts of a few files.
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrl import storage
from distrl.errors import SchemaError, StorageError

_WHOLE_BYTES = 4 << 20
_FILES_IN_MEMORY = 4
_MERGES = 3
"""Times that files may be merged away while some replies are read."""
_FOLD = 1 << 16
"""New keys that are held in a set before they go into the arrays."""

_KEY = np.dtype("S16")
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("model", pa.string()),
        ("malformed", pa.bool_()),
        ("text", pa.large_string()),
        ("tokens_in", pa.int32()),
        ("tokens_out", pa.int32()),
    ]
)


class Reply(NamedTuple):
    """What a model said, once."""

    key: str
    model: str
    malformed: bool
    """As it was judged when it came; who reads it judges again."""
    text: str
    tokens_in: int
    tokens_out: int


class Replies:
    """All replies of one place."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files: list[str] = []
        self._keys = np.zeros(0, _KEY)
        self._file, self._row = np.zeros(0, np.int32), np.zeros(0, np.int64)
        self._used = np.zeros(0, np.bool_)
        self._new: set[bytes] = set()
        self.tokens_in = self.tokens_out = 0
        """Of the different replies that `get` has given since it was opened."""
        self._waiting: list[Reply] = []
        self._lock = threading.Lock()
        self._read: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        """Different keys."""
        return len(self._keys) + len(self._new)

    def open(self) -> None:
        """Merges small files and learns which keys are there.

        Raises:
            SchemaError: If a file is not one of replies.
            StorageError: If the place cannot be read or written.
        """
        self._merge()
        self._find()
        self._used = np.zeros(len(self._keys), np.bool_)
        self.tokens_in = self.tokens_out = 0
        self._new.clear()

    def _find(self) -> None:
        """Learns where each reply lies."""
        found = storage.listing(self.uri)
        self._files = [info.base_name for info in found if _is_part(info.base_name)]
        keys, files, rows = [], [], []
        for number, name in enumerate(self._files):
            table = self._table(name, ["key"])
            keys.append(_short(table.column("key").to_pylist()))
            files.append(np.full(table.num_rows, number, np.int32))
            rows.append(np.arange(table.num_rows))
        self._keys, first = np.unique(np.concatenate([np.zeros(0, _KEY), *keys]), return_index=True)
        self._file = np.concatenate([np.zeros(0, np.int32), *files])[first]
        self._row = np.concatenate([np.zeros(0, np.int64), *rows])[first]
        self._read.clear()

    def _find_again(self) -> None:
        """After another run has merged files; what this one knows of its replies stays."""
        self._fold()
        used, is_new = self._keys[self._used], self._keys[self._file < 0]
        self._find()
        self._used = np.zeros(len(self._keys), np.bool_)
        self._insert(is_new[~np.isin(is_new, self._keys)])
        self._used = np.isin(self._keys, used)
        self._file[np.isin(self._keys, is_new)] = -1

    def is_new(self, key: str) -> bool:
        """Whether a reply came after this place was opened."""
        short = bytes.fromhex(key)[:16]
        place = self._place(short)
        return short in self._new or (place is not None and self._file[place] < 0)

    def _place(self, short: bytes) -> int | None:
        place = int(np.searchsorted(self._keys, np.array(short, _KEY)))
        # numpy gives bytes back without the zeros at their end.
        if place == len(self._keys) or self._keys[place].ljust(16, b"\0") != short:
            return None
        return place

    def add(self, reply: Reply) -> None:
        """Takes a reply; it is kept once `flush` has returned."""
        with self._lock:
            self._waiting.append(reply)
        self._new.add(bytes.fromhex(reply.key)[:16])
        if len(self._new) >= _FOLD:
            self._fold()

    def flush(self) -> None:
        """Writes what was taken since the last time as one file, if anything was.

        Raises:
            StorageError: If the place cannot be written; the replies are still held.
        """
        with self._lock:
            batch, self._waiting = self._waiting, []
        if not batch:
            return
        columns = [list(column) for column in zip(*batch, strict=True)]
        try:
            self._write(pa.table(columns, schema=_SCHEMA))
        except BaseException:
            with self._lock:
                self._waiting = batch + self._waiting
            raise

    def get(self, keys: Sequence[str]) -> list[Reply | None]:
        """The replies under some keys, of those that were there when it was opened.

        Each file is read once a call at most.

        Raises:
            SchemaError: If a file is not one of replies.
            StorageError: If a file cannot be read.
        """
        for times in range(_MERGES):
            try:
                if times:
                    self._find_again()
                return self._get(keys)
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        self._find_again()
        return self._get(keys)

    def _get(self, keys: Sequence[str]) -> list[Reply | None]:
        if not len(self._keys):
            return [None] * len(keys)
        short = _short(keys)
        places = np.minimum(np.searchsorted(self._keys, short), len(self._keys) - 1)
        found: list[Reply | None] = [None] * len(keys)
        there = np.flatnonzero((self._keys[places] == short) & (self._file[places] >= 0))
        for number in np.unique(self._file[places[there]]).tolist():
            mine = there[self._file[places[there]] == number]
            rows = self._texts(number).take(pa.array(self._row[places[mine]])).to_pylist()
            for index, row in zip(mine.tolist(), rows, strict=True):
                if row["key"] == keys[index]:
                    found[index] = reply = Reply(**row)
                    self._count(int(places[index]), reply)
        return found

    def _count(self, place: int, reply: Reply) -> None:
        if not self._used[place]:
            self._used[place] = True
            self.tokens_in += reply.tokens_in
            self.tokens_out += reply.tokens_out

    def _texts(self, number: int) -> pa.Table:
        """A file in memory, which only the last few are."""
        if number not in self._read:
            if len(self._read) >= _FILES_IN_MEMORY:
                self._read.popitem(last=False)
            self._read[number] = self._table(self._files[number], _SCHEMA.names)
        self._read.move_to_end(number)
        return self._read[number]

    def _fold(self) -> None:
        """Puts new keys into the arrays, where they have no place in a file yet."""
        self._insert(np.sort(np.array(list(self._new), _KEY)))
        self._new = set()

    def _insert(self, keys: np.ndarray) -> None:
        """Puts sorted keys without a place in a file among the others."""
        spots = np.searchsorted(self._keys, keys)
        self._keys = np.insert(self._keys, spots, keys)
        self._file, self._row = np.insert(self._file, spots, -1), np.insert(self._row, spots, -1)
        self._used = np.insert(self._used, spots, False)

    def _merge(self) -> None:
        """Writes small files again as larger ones, in their order, and removes them."""
        found = storage.listing(self.uri)
        small = [
            info for info in found if _is_part(info.base_name) and info.size < _WHOLE_BYTES
        ]  # fmt: skip
        for group in _groups([(info.base_name, info.size) for info in small]):
            if len(group) > 1:
                tables = [self._table(name, _SCHEMA.names) for name in group]
                self._write(pa.concat_tables(tables), group[0])
                for name in group:
                    storage.delete(storage.join(self.uri, name))

    def _write(self, table: pa.Table, like: str | None = None) -> None:
        """Writes one file; its name keeps the order in which replies came."""
        # Digits of a fixed number, so that names sort by time; the rest keeps writers apart.
        stamp = like.split("-")[1] if like else f"{time.time_ns():020d}"
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = f"part-{stamp}-{secrets.token_hex(4)}.parquet"
        storage.write_bytes(storage.join(self.uri, name), sink.getvalue().to_pybytes())

    def _table(self, name: str, columns: Sequence[str]) -> pa.Table:
        uri = storage.join(self.uri, name)
        try:
            with storage.open_input(uri) as file:
                return pq.read_table(file, columns=list(columns)).select(list(columns))
        except (pa.ArrowInvalid, KeyError) as error:
            first = str(error).splitlines()[0]
            raise SchemaError(
                f"{uri} is no file of replies: {first}; remove it, and what it held is asked again"
            ) from error
        except OSError as error:
            raise storage.explained(uri, "read", error) from error


def _groups(small: list[tuple[str, int]]) -> Iterator[list[str]]:
    """Neighbors in the order given that make a whole file together."""
    group: list[str] = []
    size = 0
    for name, num_bytes in small:
        group.append(name)
        size += num_bytes
        if size >= _WHOLE_BYTES:
            yield group
            group, size = [], 0
    yield group


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _short(keys: Sequence[str]) -> np.ndarray:
    """The first 16 bytes of keys: enough to find a reply, whose whole key is then compared."""
    return np.array([bytes.fromhex(key)[:16] for key in keys], _KEY)
