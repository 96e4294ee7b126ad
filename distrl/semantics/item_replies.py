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
    for values in (_as_json(reply), _by_names(reply, keys)):
        texts = [_flat(values.get(_plain(key))) for key in keys]
        if all(texts):
            return " ".join(texts)
    return None


def _as_json(reply: str) -> dict[str, object]:
    """The first JSON object in a reply, its end mended; empty if there is none."""
    start = reply.find("{")
    if start < 0:
        return {}
    body = re.sub(r",(\s*[}\]])", r"\1", reply[start:])
    body = re.sub(r"\s*(```\s*)?$", "", body)
    for closing in _CLOSING:
        try:
            found, _ = json.JSONDecoder(strict=False).raw_decode(body.rstrip(",") + closing)
        except ValueError:
            continue
        return {_plain(name): value for name, value in found.items()}
    return {}


def _by_names(reply: str, keys: Sequence[str]) -> dict[str, object]:
    """What stands behind each key up to the next, stripped of quotes, commas and braces."""
    patterns = [re.sub(r"[\s_]+", r"[\\s_]+", _plain(key)) for key in keys]
    spots = [
        re.search(rf"[\"'*]{pattern}[\"'*]+\s*:", reply, re.IGNORECASE) for pattern in patterns
    ]
    found = sorted(
        (spot.start(), spot.end(), _plain(key))
        for spot, key in zip(spots, keys, strict=True)
        if spot is not None
    )
    ends = [start for start, _, _ in found[1:]] + [len(reply)]
    return {
        key: _value(reply[behind:end])
        for (_, behind, key), end in zip(found, ends, strict=True)
    }  # fmt: skip


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
    return "" if value is None else " ".join(str(value).split())


def _plain(key: object) -> str:
    return re.sub(r"[\s_]+", " ", str(key)).strip().lower()
