"""Events from files of lines: JSON objects, or `user item item ...`."""

import io
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from distrl.data.event_columns import BLOCK_BYTES, EventColumns, by_role, open_text, text_problem
from distrl.data.source_files import ReadPart, SourceFile
from distrl.errors import SchemaError


def text_blocks(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """A text file in blocks of whole lines, each with the number of its first line, from 1."""
    line, rest = 1, b""
    with open_text(file) as stream:
        while block := stream.read(BLOCK_BYTES):
            whole, newline, rest_of_block = block.rpartition(b"\n")
            if not newline:
                rest += block
                continue
            lines = rest + whole + newline
            yield line, lines.removeprefix(b"\xef\xbb\xbf") if line == 1 else lines
            line += lines.count(b"\n")
            rest = rest_of_block
    if rest.strip():
        yield line, rest.removeprefix(b"\xef\xbb\xbf") if line == 1 else rest


def read_jsonl(part: ReadPart, columns: EventColumns) -> Iterator[pa.Table]:
    """Tables of a JSON Lines file's events.

    Raises:
        SchemaError: If a line is not a JSON object, or a value is not of its type.
    """
    schema = pa.schema([(name, columns.text_type(role)) for role, name in columns.names])
    for line, block in text_blocks(part.file):
        if not block.strip():
            continue
        try:
            table = pajson.read_json(
                io.BytesIO(block),
                # A block is parsed whole: Arrow cannot split a line that is longer than a block.
                read_options=pajson.ReadOptions(use_threads=False, block_size=len(block) + 1),
                parse_options=pajson.ParseOptions(
                    explicit_schema=schema, unexpected_field_behavior="ignore"
                ),
            )
        except pa.ArrowInvalid as error:
            raise _locate_json(part.file, columns, line, block, error) from error
        yield by_role(table, columns)


def _locate_json(
    file: SourceFile, columns: EventColumns, line: int, block: bytes, error: Exception
) -> SchemaError:
    for number, text in enumerate(block.split(b"\n"), start=line):
        if not text.strip():
            continue
        where = f"{file.uri} line {number}"
        try:
            row = json.loads(text)
        except ValueError as found:
            return SchemaError(f"{where} is not JSON: {found}")
        if not isinstance(row, dict):
            return SchemaError(
                f"{where} is not a JSON object: {text[:80].decode(errors='replace')}"
            )
        for role, name in columns.names:
            type_, value = columns.text_type(role), row.get(name)
            if value is not None and not _json_fits(value, type_):
                return SchemaError(f"{where}: {name}={value!r} is not {_words(type_)}")
    return SchemaError(f"{file.uri} near line {line}: {str(error).splitlines()[0]}")


def _json_fits(value: object, type_: pa.DataType) -> bool:
    if isinstance(value, bool):
        return False
    if pa.types.is_string(type_):
        return isinstance(value, str)
    return isinstance(value, int if pa.types.is_integer(type_) else int | float)


def _words(type_: pa.DataType) -> str:
    if pa.types.is_string(type_):
        return "a string, which the first rows are"
    kind = "an integer" if pa.types.is_integer(type_) else "a number"
    return f"{kind}, which the first rows are"


def read_sequences(part: ReadPart, columns: EventColumns) -> Iterator[pa.Table]:
    """Tables of user and item, one row an interaction, from `user item item ...` lines.

    Raises:
        SchemaError: If a line has no item, or an id is not of its type.
    """
    for line, block in text_blocks(part.file):
        yield _sequences_block(part.file, columns, line, block)


def _sequences_block(file: SourceFile, columns: EventColumns, line: int, block: bytes) -> pa.Table:
    try:
        lines = [text.split() for text in block.decode().split("\n")]
    except UnicodeDecodeError as error:
        raise SchemaError(f"{file.uri} near line {line} is not UTF-8: {error}") from error
    lengths = np.fromiter((len(words) for words in lines), np.int64, len(lines))
    if (lengths == 1).any():
        number = line + int(np.flatnonzero(lengths == 1)[0])
        raise SchemaError(
            f"{file.uri} line {number} has a user and no item; a line is `user item item ...`"
        )
    numbers = line + np.flatnonzero(lengths)
    counts = lengths[lengths > 0] - 1
    users = _typed([words[0] for words in lines if words], columns.user_type, file, "user", numbers)
    items = [word for words in lines for word in words[1:]]
    typed_items = _typed(items, columns.item_type, file, "item", np.repeat(numbers, counts))
    return pa.table(
        {"user": users.take(np.repeat(np.arange(len(users)), counts)), "item": typed_items}
    )


def _typed(
    words: list[str], type_: pa.DataType, file: SourceFile, role: str, numbers: np.ndarray
) -> pa.Array:
    try:
        return pa.array(words, pa.string()).cast(type_)
    except pa.ArrowInvalid as error:
        problems = ((index, text_problem(word, type_)) for index, word in enumerate(words))
        bad, problem = next((found for found in problems if found[1]), (0, str(error)))
        raise SchemaError(
            f"{file.uri} line {numbers[bad]}: {role} {words[bad]!r} {problem}"
        ) from error
