"""Prompts about the items and windows of a store, and the key that a reply is kept under."""

import hashlib
import json
import string
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from distrl.ops.ragged import Ragged
from distrl.semantics.describe_config import DescribeConfig, GenerationConfig
from distrl.semantics.examples import Examples
from distrl.semantics.item_records import ItemRecords
from distrl.semantics.item_replies import item_text

BLOCK = 1024
"""Prompts that are spelled out at a time."""


class Prompt(NamedTuple):
    """One question; several attempts at it have several keys."""

    messages: tuple[dict[str, str], ...]
    about_item: bool
    raw: str
    """What stands in for a reply."""


class Request(NamedTuple):
    """One attempt at a prompt, as it is sent."""

    key: str
    """sha256 in hex of model, messages and parameters."""
    messages: tuple[dict[str, str], ...]
    parameters: dict[str, Any]
    max_tokens: int
    """Of the reply."""


def request_of(prompt: Prompt, generation: GenerationConfig, attempt: int) -> Request:
    """The attempt of that number; 0 is the first."""
    bound = generation.max_tokens_item if prompt.about_item else generation.max_tokens_window
    temperature, top_p = generation.temperature, generation.top_p
    if attempt and generation.reask_temperature is not None:
        # What the endpoint is not told at first it may not take at all.
        temperature = None if temperature is None else generation.reask_temperature
        top_p = None if top_p is None else 1.0
    parameters: dict[str, Any] = {generation.max_tokens_name: bound}
    if temperature is not None:
        parameters["temperature"] = temperature
    if top_p is not None:
        parameters["top_p"] = top_p
    parameters |= generation.extra | (generation.extra_item if prompt.about_item else {})
    asked = {"model": generation.model, "messages": prompt.messages, "parameters": parameters}
    if attempt:
        asked["attempt"] = attempt
    content = json.dumps(asked, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    key = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()
    return Request(key, prompt.messages, parameters, bound)


def text_of(prompt: Prompt, reply: str, item_keys: tuple[str, str]) -> str | None:
    """What a reply says; None if it is malformed."""
    if prompt.about_item:
        return item_text(reply, item_keys)
    return reply if reply.strip() else None


class Prompter:
    """Spells prompts out, a block at a time."""

    def __init__(self, config: DescribeConfig, texts: ItemRecords, examples: Examples) -> None:
        self._texts, self._examples = texts, examples
        prompts = config.prompts
        general = {"domain": prompts.domain, "behavior": prompts.behavior}
        self._separator, self._general = prompts.window_separator, general
        self._window_system = string.Template(prompts.window_system).substitute(general)
        self._item_system = string.Template(prompts.item_system).substitute(general)
        self._item_user = string.Template(prompts.item_user)

    def items(self, first: int, last: int) -> list[Prompt]:
        """Prompts about the items of an inclusive range of dense ids."""
        prompts = []
        raws = self._texts.raw.slice(first - 1, last - first + 1).to_pylist()
        attributes = self._texts.attributes.slice(first - 1, last - first + 1).to_pylist()
        for item, raw, of_item in zip(range(first, last + 1), raws, attributes, strict=True):
            user = self._item_user.substitute(
                self._general, attributes=of_item, examples=self._histories(item)
            )
            prompts.append(Prompt(_messages(self._item_system, user), True, raw))
        return prompts

    def windows(self, shown: Ragged) -> list[Prompt]:
        """Prompts about windows.

        Args:
            shown: The items that each window shows, oldest first.
        """
        names, prompts = self._texts.show(shown.values), []
        for start, end in zip(shown.offsets[:-1], shown.offsets[1:], strict=True):
            user = self._separator.join(names[start:end])
            prompts.append(Prompt(_messages(self._window_system, user), False, user))
        return prompts

    def _histories(self, item: int) -> str:
        """Source: SRA-CL's code in form, a trailing `# ` included."""
        histories = self._examples.of(item)
        if not histories:
            return "[None]"
        return "".join(f"[{' -> '.join(self._texts.show(one))}] # " for one in histories)


def item_blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """An inclusive range of dense ids in inclusive ranges, some ids at a time."""
    for start in range(first, last + 1, BLOCK):
        yield start, min(start + BLOCK - 1, last)


def pieces(num: int) -> Iterator[np.ndarray]:
    """The numbers below `num`, some at a time."""
    for start in range(0, num, BLOCK):
        yield np.arange(start, min(start + BLOCK, num))


def _messages(system: str, user: str) -> tuple[dict[str, str], ...]:
    return {"role": "system", "content": system}, {"role": "user", "content": user}
