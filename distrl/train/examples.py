"""Mended sequences as a page that people read, with the items' own names."""

from collections.abc import Iterable, Mapping, Sequence

from distrl.contract import Mark
from distrl.data.item_lines import item_lines
from distrl.data.store import read_item_ids
from distrl.schema import Manifest

SHOWN = {"kept": "{}", "deleted": "~~{}~~", "inserted": "**+ {}**"}
NAME_CHARS = 60


def page(
    examples: Mapping[str, Sequence[Sequence[tuple[int, Mark]]]], names: Mapping[int, str]
) -> str:
    """Markdown: one line a sequence, oldest item first, deleted items struck out, inserted bold."""
    parts = ["Oldest item first. ~~Struck out~~: deleted. **+ Bold**: inserted."]
    for what, rows in examples.items():
        parts.append(f"## {what[0].upper()}{what[1:]}")
        parts += [
            f"{number}. "
            + " / ".join(_shown(names.get(item, str(item)), mark) for item, mark in row)
            for number, row in enumerate(rows, start=1)
        ]
    return "\n\n".join(parts) + "\n"


def _shown(name: str, mark: Mark) -> str:
    plain = "".join(" " if char in "\n*~|" else char for char in name).strip()
    return SHOWN[mark].format(plain if len(plain) <= NAME_CHARS else f"{plain[:NAME_CHARS]}...")


def item_names(
    items: Iterable[int], store_uri: str, manifest: Manifest, text_uri: str | None
) -> dict[int, str]:
    """What some items are called: their title or text, or else the caller's own id.

    Raises:
        SchemaError: If a part of the store is torn, or a line of the texts is not JSON with `item`.
        StorageError: If either cannot be read.
    """
    own = read_item_ids(store_uri, manifest)
    ids = {item: str(own[item - 1].as_py()) for item in set(items) if 0 < item <= len(own)}
    texts = {} if text_uri is None else _texts(text_uri, set(ids.values()))
    return {item: texts.get(name, name) for item, name in ids.items()}


def _texts(uri: str, wanted: set[str]) -> dict[str, str]:
    return {
        line.item: str(line.record.get("title") or line.record.get("text") or line.item)
        for line in item_lines(uri, "data.item_text_uri")
        if line.item in wanted
    }
