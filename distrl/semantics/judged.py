"""What kept replies say about prompts, judged anew whenever they are read.

`prompts.item_keys` is no part of what a reply is kept under: a reply that was malformed under other
keys may do now, and the other way round.
"""

from collections.abc import Sequence
from typing import NamedTuple

from distrl.semantics.describe_config import DescribeConfig
from distrl.semantics.prompts import Prompt, request_of, text_of
from distrl.semantics.replies import Replies


class Judged(NamedTuple):
    """Of some prompts, in their order."""

    texts: list[str | None]
    """What the first well-formed reply says; None where there is none."""
    missing: list[int | None]
    """The attempt to ask next; None where there is a text, or no attempt left."""


def judged(prompts: Sequence[Prompt], config: DescribeConfig, replies: Replies) -> Judged:
    """What the replies say that were there when they were opened.

    Raises:
        SchemaError: If a file of replies is torn.
        StorageError: If one cannot be read.
    """
    texts: list[str | None] = [None] * len(prompts)
    missing: list[int | None] = [None] * len(prompts)
    left = list(range(len(prompts)))
    for attempt in range(config.reask + 1):
        keys = [request_of(prompts[place], config.generation, attempt).key for place in left]
        for place, reply in zip(left, replies.get(keys), strict=True):
            if reply is None:
                missing[place] = attempt
            else:
                texts[place] = text_of(prompts[place], reply.text, config.prompts.item_keys)
        left = [place for place in left if texts[place] is None and missing[place] is None]
    return Judged(texts, missing)
