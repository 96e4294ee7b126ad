"""Texts about the items and windows of a store: asked for, kept, and then written as a table.

    store, item fields -> prompts -> replies, kept for good -> descriptions, a table of the store

Prompts are spelled out twice, a block at a time: once to ask for what is not kept, once to write
the table out of what is. So a run that ends in between has lost nothing, and the table depends on
the replies alone and not on who gave them when.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from distrl import storage
from distrl.data.histories import read_histories
from distrl.data.side_tables import (
    Part,
    SideManifest,
    check_part_sizes,
    clear_table,
    find_table,
    part_path,
    write_manifest,
    write_part,
)
from distrl.data.store import check_sizes, manifest_hash, read_manifest
from distrl.errors import ConfigError
from distrl.ops.windows import Windows, window_items, windows_of
from distrl.schema import Manifest
from distrl.semantics.asked import Asked
from distrl.semantics.asking import ask_all
from distrl.semantics.describe_config import DescribeConfig
from distrl.semantics.endpoint import api_key
from distrl.semantics.examples import find_examples, no_examples
from distrl.semantics.item_records import ItemRecords, read_item_records
from distrl.semantics.judged import judged
from distrl.semantics.prompts import Prompt, Prompter, item_blocks, pieces
from distrl.semantics.replies import Replies
from distrl.semantics.vllm_engine import check_vllm, generate_all

_ITEMS_A_PART = 1 << 16

_ITEMS = pa.schema([("item_id", pa.int32()), ("text", pa.string()), ("source", pa.string())])
_WINDOWS = pa.schema(
    [
        ("row", pa.int32()),
        ("length", pa.int32()),
        ("text", pa.string()),
        ("source", pa.string()),
    ]
)


class Described(NamedTuple):
    """A table, and what this run did for it; nothing if it was there."""

    table: SideManifest
    asked: Asked | None


def describe(
    config: DescribeConfig,
    *,
    overwrite: bool = False,
    connect: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Described:
    """Makes a table of texts about a store, or finds that it is already made.

    A table of another store that once lay in the place is replaced.

    Args:
        config: What to describe, and who does.
        overwrite: Replace a table made with other settings, or a torn one. Replies that are kept
            are used again.
        connect: Connects to Ray, unless that is done; called only where Ray is needed.
        say: Told of progress, a line at a time.

    Raises:
        ConfigError: If a table of the same store was made with other settings, the endpoint
            refuses the key or the model, or the budget is spent.
        SchemaError: If the store, the item texts, kept replies or a table that is there is torn.
        StorageError: If something cannot be read or written, or the endpoint does not answer.
    """
    manifest = read_manifest(config.store_uri)
    check_sizes(config.store_uri, manifest)
    texts = read_item_records(
        config.item_texts, config.prompts.window_item, config.store_uri, manifest
    )
    made_with = _made_with(config, texts)
    if not overwrite:
        table = _finished(config, manifest, made_with)
        if table is not None:
            say(f"{config.store_uri} already has descriptions/{config.name}: nothing to do")
            return Described(table, None)
    key = api_key(config.endpoint) if config.engine == "endpoint" else ""
    if config.engine == "vllm":
        check_vllm()
    storage.check_writable(config.store_uri)
    storage.check_writable(config.kept_uri)
    return _Description(config, manifest, texts, made_with, connect, say).run(key)


def _made_with(config: DescribeConfig, texts: ItemRecords) -> dict[str, Any]:
    """What decides a table's content, besides its store."""
    decides = {"items", "windows", "held_out", "max_len", "reask", "prompts", "generation"}
    said = config.model_dump(mode="json", include=decides)
    said["item_texts"] = config.item_texts.model_dump(mode="json", exclude={"uri"})
    said["item_texts"]["sha256"] = texts.sha256
    return said


def _finished(
    config: DescribeConfig, manifest: Manifest, made_with: dict[str, Any]
) -> SideManifest | None:
    """The table that is there, if it is of this store."""
    table = find_table(config.store_uri, "descriptions", config.name)
    if table is None or table.store_hash != manifest_hash(manifest):
        return None
    was, now = _flat(table.made_with), _flat(made_with)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"{config.store_uri} already has descriptions/{config.name} made with "
                f"{name}={was.get(name)!r}, not {now.get(name)!r}: --overwrite replaces it, "
                "another name= keeps both"
            )
    check_part_sizes(config.store_uri, config.name, table)
    return table


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


class _Description:
    """One run: asking, then writing."""

    def __init__(
        self,
        config: DescribeConfig,
        manifest: Manifest,
        texts: ItemRecords,
        made_with: dict[str, Any],
        connect: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._manifest, self._texts = config, manifest, texts
        self._made_with, self._connect, self._say = made_with, connect, say
        self._replies = Replies(config.kept_uri)
        self._counts = {"items_reply": 0, "items_raw": 0, "windows_reply": 0, "windows_raw": 0}

    def run(self, key: str) -> Described:
        """A table that is there stays until the last reply for its successor has come."""
        config = self._config
        if config.engine == "vllm":
            self._connect()
        self._prompter = self._prompter_made()
        self._replies.open()
        if len(self._replies):
            self._say(f"{len(self._replies):,} replies are kept in {config.kept_uri}")
        total = self._num_prompts()
        if config.engine == "vllm":
            asked = generate_all(config, self._all_prompts, self._replies, total, self._say)
        else:
            asked = ask_all(
                config, key, self._all_prompts(), self._replies, total, self._say
            )  # fmt: skip
        self._replies.open()
        clear_table(config.store_uri, "descriptions", config.name)
        table = self._written(asked)
        write_manifest(config.store_uri, config.name, table)
        return Described(table, asked)

    def _prompter_made(self) -> Prompter:
        config = self._config
        examples = no_examples(config.prompts.example_len)
        if config.items and config.prompts.num_examples:
            self._connect()
            examples = find_examples(config, self._manifest, self._say)
        return Prompter(config, self._texts, examples)

    def _num_prompts(self) -> int:
        """As the manifest knows it; windows="last" with held_out has up to three a user."""
        config, manifest = self._config, self._manifest
        windows = 0
        if config.windows == "every":
            windows = manifest.num_prefixes
            if config.held_out:
                windows = manifest.num_interactions - manifest.num_users
        elif config.windows == "last":
            windows = manifest.num_trainable_rows
            if config.held_out:
                windows = 3 * manifest.num_users
        return windows + (manifest.num_items if config.items else 0)

    def _all_prompts(self) -> Iterator[list[Prompt]]:
        """All prompts in the order of the table, a block at a time."""
        if self._config.items:
            for first, last in item_blocks(1, self._manifest.num_items):
                yield self._prompter.items(first, last)
        for shard in range(self._num_window_parts()):
            for _, prompts in self._windows(shard, verify=True):
                yield prompts

    def _num_window_parts(self) -> int:
        return 0 if self._config.windows == "none" else len(self._manifest.sequences)

    def _windows(self, shard: int, *, verify: bool) -> Iterator[tuple[Windows, list[Prompt]]]:
        """Windows of a shard and their prompts; rows are those of the shard."""
        config = self._config
        assert config.windows != "none", "no shard is read where no window is described"
        of_shard = self._manifest.sequences[shard]
        for first, histories in read_histories(
            config.store_uri, of_shard, self._manifest.num_items, verify=verify
        ):
            windows = windows_of(histories.lengths, config.windows, held_out=config.held_out)
            for some in pieces(len(windows.row)):
                here = Windows(windows.row[some], windows.length[some])
                shown = window_items(histories, here, config.max_len)
                yield Windows(here.row + first, here.length), self._prompter.windows(shown)

    def _written(self, asked: Asked) -> SideManifest:
        """All parts, and the manifest that makes them a table."""
        config, manifest = self._config, self._manifest
        items, windows = [], []
        for part in range(self._num_item_parts()):
            items.append(self._write_items(part))
            self._say(f"write  {part + 1:,}/{self._num_item_parts():,} parts of items")
        for shard in range(self._num_window_parts()):
            windows.append(self._write_windows(shard))
            self._say(f"write  {shard + 1:,}/{len(manifest.sequences):,} parts of windows")
        replies = self._replies
        facts: dict[str, float | int | str] = {
            **self._counts,
            "items_without_text": self._texts.num_missing,
            "prompts_asked": asked.asked,
            "prompts_asked_again": asked.reasked,
            "prompts_from_cache": asked.from_cache,
            "prompts_unanswered": asked.unanswered,
            "tokens_in": replies.tokens_in,
            "tokens_out": replies.tokens_out,
            "cost": config.prices.cost(replies.tokens_in, replies.tokens_out),
        }
        return SideManifest(
            kind="descriptions",
            store_hash=manifest_hash(manifest),
            made_with=self._made_with,
            windows=config.windows,
            held_out=config.held_out,
            max_len=config.max_len,
            items=tuple(items),
            window_parts=tuple(windows),
            facts=facts,
        )

    def _write_windows(self, shard: int) -> Part:
        path = part_path("descriptions", self._config.name, "windows", shard)
        return write_part(self._config.store_uri, path, self._window_tables(shard), _WINDOWS)

    def _num_item_parts(self) -> int:
        return -(-self._manifest.num_items // _ITEMS_A_PART) if self._config.items else 0

    def _write_items(self, part: int) -> Part:
        path = part_path("descriptions", self._config.name, "items", part)
        return write_part(self._config.store_uri, path, self._item_tables(part), _ITEMS)

    def _item_tables(self, part: int) -> Iterator[pa.Table]:
        before = part * _ITEMS_A_PART
        end = min(before + _ITEMS_A_PART, self._manifest.num_items)
        for first, last in item_blocks(before + 1, end):
            texts, sources = self._settled("items", self._prompter.items(first, last))
            yield pa.table([pa.array(range(first, last + 1), pa.int32()), texts, sources], _ITEMS)

    def _window_tables(self, shard: int) -> Iterator[pa.Table]:
        for windows, prompts in self._windows(shard, verify=False):
            texts, sources = self._settled("windows", prompts)
            columns = [pa.array(windows.row, pa.int32()), pa.array(windows.length, pa.int32())]
            yield pa.table([*columns, texts, sources], schema=_WINDOWS)

    def _settled(self, kind: str, prompts: list[Prompt]) -> tuple[pa.Array, pa.Array]:
        """The text of each prompt and what it is made of."""
        texts = judged(prompts, self._config, self._replies).texts
        sources = ["raw" if text is None else "reply" for text in texts]
        for source in ("raw", "reply"):
            self._counts[f"{kind}_{source}"] += sources.count(source)
        whole = [
            prompt.raw if text is None else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return pa.array(whole, pa.string()), pa.array(sources, pa.string())
