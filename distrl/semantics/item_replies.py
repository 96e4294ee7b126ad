"""What a reply about an item says, however badly its JSON is written."""

import json
import re
from collections.abc import Sequence

_CLOSING = ("", '"}', "}", '"]}', "]}")
"""What a reply may lack at its end."""


def item_text(reply: str, keys: Sequence[str]) -> str | None:
    """The values of the keys, joined by a space; None if one is missing or empty.

    Code fences, prose around the JSON, trailing commas, single quotes, line breaks within a value
    and missing braces are forgiven; so are the case of keys and `_` for a space.

    Source: SRA-CL's code embeds the raw reply with its braces and key names; the paper speaks of
        the summary. Here it is both fields joined.
    """
    try:
        values = _as_json(reply)
        if not all(_plain(key) in values for key in keys):
            values = _by_names(reply, keys)
        texts = [_flat(values.get(_plain(key))) for key in keys]
    except RecursionError:  # brackets within brackets, thousands deep
        return None
    return " ".join(texts) if all(texts) else None


def _as_json(reply: str) -> dict[str, object]:
    """The first JSON object in a reply, its end mended; empty if there is none."""
    start = reply.find("{")
    if start < 0:
        return {}
    body = reply[start:].rstrip().removesuffix("```").rstrip()
    mended = re.sub(r",(\s*[}\]])", r"\1", body).rstrip(",")
    for text in (body, *(mended + closing for closing in _CLOSING)):
        try:
            found, _ = json.JSONDecoder(strict=False).raw_decode(text)
        except ValueError:
            continue
        return {_plain(name): value for name, value in found.items()}
    return {}


def _by_names(reply: str, keys: Sequence[str]) -> dict[str, object]:
    """What stands behind each key up to the next, stripped of quotes, commas and braces."""
    found = []
    for key in map(_plain, keys):
        words = r"[\s_]+".join(map(re.escape, key.split()))
        # Bounded, or a reply of thousands of line breaks would take seconds.
        name = rf"(?:^|[\n{{,\"'*#])\s{{0,40}}[\"'*]{{0,6}}{words}[\"'*]{{0,6}}\s{{0,40}}:"
        spot = re.search(name, reply, re.IGNORECASE)
        if spot is not None:
            found.append((spot.start(), spot.end(), key))
    found.sort()
    ends = [*(start for start, _, _ in found[1:]), len(reply)]
    return {key: _value(reply[behind : ends[i]]) for i, (_, behind, key) in enumerate(found)}


def _value(text: str) -> str:
    """One value out of the piece of a reply that it stands in."""
    text = text.strip().strip("*").strip()
    quote = text[:1]
    if quote in ("'", '"'):
        # Its last closing quote; an apostrophe is followed by a letter.
        closings = list(re.finditer(rf"{quote}(?=\s*([,}}\n]|$))", text[1:]))
        text = text[1 : 1 + closings[-1].start()] if closings else text[1:]
    return text.split("```")[0].strip().rstrip(",}").strip()


def _flat(value: object) -> str:
    """A value as one line of text."""
    if isinstance(value, list):
        return " ".join(filter(None, map(_flat, value)))
    if isinstance(value, dict):
        return " ".join(filter(None, map(_flat, value.values())))
    # A lone half of a surrogate pair, as "\\ud83d" in cut JSON, is no text that can be stored.
    return "" if value is None else " ".join(stored(str(value)).split())


def stored(text: str) -> str:
    """Text as UTF-8 can hold it."""
    return text.encode("utf-8", "replace").decode()


def _plain(key: object) -> str:
    return re.sub(r"[\s_]+", " ", str(key)).strip().lower()
