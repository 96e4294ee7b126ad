"""Replies of a model that runs on the cluster's own GPUs, through `ray.data.llm` and vLLM.

Not run on a GPU yet: what goes in, what comes out and the check for vLLM are tested; the calls are
written after the source of Ray 2.60 (`ray/data/llm.py`, `vllm_engine_stage.py`).

The prompts without a reply are written as a dataset below the place of the replies, which goes
through the engine, and its rows are kept as they come. Each attempt at malformed replies is a
dataset of its own, and so are items and windows, whose parameters differ: Arrow gives each row of
a block the parameters of all, empty, and vLLM takes no empty ones. The model is loaded once a
dataset.
"""

import importlib.util
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from distrl import storage
from distrl.cluster import Need, check_capacity
from distrl.errors import ConfigError, StorageError
from distrl.semantics.asked import Asked
from distrl.semantics.asking import COMMIT_S
from distrl.semantics.describe_config import DescribeConfig, GenerationConfig
from distrl.semantics.item_replies import item_text
from distrl.semantics.judged import judged
from distrl.semantics.prompts import Prompt, Request, request_of
from distrl.semantics.replies import Replies, Reply

FOLDER = "asking"
_ROWS_PER_FILE = 16_384
_SCHEMA = pa.schema(
    [("key", pa.string()), ("about_item", pa.bool_()), ("request", pa.large_string())]
)


def check_vllm() -> None:
    """Raises ConfigError unless vLLM can be imported."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine=vllm needs the package vllm, which is not installed: install it in the image "
            "of the cluster (pip install vllm), or use engine=endpoint"
        )


def generate_all(
    config: DescribeConfig,
    prompts: Callable[[], Iterator[list[Prompt]]],
    replies: Replies,
    total: int,
    say: Callable[[str], None],
) -> Asked:
    """Has a reply kept for every prompt that vLLM answers.

    Args:
        config: The model and how it runs.
        prompts: Gives all prompts, as often as it is called.
        replies: Where they are kept.
        total: Prompts that there are.
        say: Told of progress, a line at a time.

    Raises:
        ConfigError: If the cluster has not the GPUs.
        StorageError: If prompts or replies cannot be written, or the engine fails at every prompt.
    """
    asked = Asked(total)
    # One copy may lie on several nodes: each of its GPUs is a bundle of its own to Ray.
    gpus = Need(
        f"GPUs of {config.vllm.concurrency} copies of the model", {"GPU": 1.0}, config.vllm.gpus
    )
    check_capacity([gpus], keys="vllm.concurrency or the parallel sizes in vllm.engine_kwargs")
    # Of this run alone: another one may ask into the same place.
    place = storage.join(replies.uri, f"{FOLDER}-{secrets.token_hex(4)}")
    try:
        for attempt in range(config.reask + 1):
            replies.flush()
            replies.open()
            counts = _write_missing(config, prompts(), replies, attempt, asked, place)
            for kind, num in counts.items():
                say(f"vllm  attempt {attempt}: {num:,} prompts about {kind} without a reply")
                if num:
                    _generate(config, storage.join(place, kind), num, attempt, replies, asked, say)
            storage.delete(place)
    finally:
        replies.flush()
        storage.delete(place)
    return asked


def _generate(
    config: DescribeConfig,
    place: str,
    num: int,
    attempt: int,
    replies: Replies,
    asked: Asked,
    say: Callable[[str], None],
) -> None:
    """Has one dataset answered, and keeps what comes about every second."""
    had, failed, started = asked.came, asked.unanswered, time.monotonic()
    for came, row in enumerate(_generated(config, place), start=1):
        _take(config, row, attempt, replies, asked)
        if time.monotonic() - started > COMMIT_S:
            replies.flush()
            started = time.monotonic()
            say(f"vllm  attempt {attempt}: {came:,}/{num:,} rows")
    if asked.came == had:
        raise StorageError(
            f"vllm made no reply to any of {num:,} prompts; {asked.unanswered - failed:,} ended "
            f"with an error, the last: {asked.last_failure}"
        )


def row_in(request: Request, about_item: bool) -> dict[str, Any]:
    """A request as a row of the dataset."""
    asked = {"messages": list(request.messages), "sampling_params": sampling_params(request)}
    # As text: requests with other parameters would be given each other's, empty.
    return {"key": request.key, "about_item": about_item, "request": json.dumps(asked)}


def engine_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the dataset as the engine reads it."""
    asked = json.loads(row["request"])
    return {"key": row["key"], "about_item": row["about_item"], **asked}


def sampling_params(request: Request) -> dict[str, Any]:
    """A request's parameters by the names of vLLM's SamplingParams."""
    named = {name: value for name, value in request.parameters.items() if name != "model"}
    named.pop("max_completion_tokens", None)
    return {**named, "max_tokens": request.max_tokens}


def reply_of(
    row: dict[str, Any], generation: GenerationConfig, item_keys: tuple[str, str]
) -> Reply | None:
    """What the engine made of a row; None if it failed at it."""
    if row.get("__inference_error__") or row.get("key") is None:
        return None
    text = row["text"] or ""
    well = item_text(text, item_keys) is not None if row["about_item"] else bool(text.strip())
    return Reply(
        row["key"],
        generation.model,
        not well,
        text,
        int(row["tokens_in"]),
        int(row["tokens_out"]),
    )


def _take(
    config: DescribeConfig, row: dict[str, Any], attempt: int, replies: Replies, asked: Asked
) -> None:
    reply = reply_of(row, config.generation, config.prompts.item_keys)
    if reply is None:
        asked.unanswered += 1
        asked.failures["vllm"] += 1
        asked.last_failure = str(row.get("__inference_error__"))[:200]
        return
    replies.add(reply)
    asked.spend(reply.tokens_in, reply.tokens_out, config.prices)
    if attempt:
        asked.reasked += 1
    else:
        asked.asked += 1


def _write_missing(
    config: DescribeConfig,
    blocks: Iterator[list[Prompt]],
    replies: Replies,
    attempt: int,
    asked: Asked,
    place: str,
) -> dict[str, int]:
    """Writes what needs this attempt, each different request once, in two folders; how many."""
    rows: dict[str, list[dict[str, Any]]] = {"items": [], "windows": []}
    counts = dict.fromkeys(rows, 0)
    seen: set[bytes] = set()
    num_files = 0

    def write(kind: str) -> None:
        nonlocal num_files
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows[kind], schema=_SCHEMA), sink, compression="zstd")
        uri = storage.join(place, kind, f"part-{num_files:05d}.parquet")
        storage.write_bytes(uri, sink.getvalue().to_pybytes())
        num_files += 1
        rows[kind].clear()

    for block in blocks:
        missing_of_block = judged(block, config, replies).missing
        for prompt, missing in zip(block, missing_of_block, strict=True):
            if not attempt:
                asked.prompts += 1
                asked.from_cache += missing is None
            if missing != attempt:
                continue
            request = request_of(prompt, config.generation, attempt)
            key = bytes.fromhex(request.key)
            if key in seen:
                asked.repeated += not attempt
                continue
            seen.add(key)
            kind = "items" if prompt.about_item else "windows"
            counts[kind] += 1
            rows[kind].append(row_in(request, prompt.about_item))
        for kind, waiting in rows.items():
            if len(waiting) >= _ROWS_PER_FILE:
                write(kind)
    for kind, waiting in rows.items():
        if waiting:
            write(kind)
    return counts


def _generated(config: DescribeConfig, place: str) -> Iterator[dict[str, Any]]:
    """What comes out of the engine, a row a request, in any order."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # takes seconds to import

    vllm = config.vllm
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=config.generation.model,
            engine_kwargs=dict(vllm.engine_kwargs),
            concurrency=vllm.concurrency,
            batch_size=vllm.batch_size,
            accelerator_type=vllm.accelerator_type,
            should_continue_on_error=True,
        ),
        preprocess=engine_row,
        postprocess=row_out,
        builder_kwargs=(
            {"chat_template_kwargs": dict(vllm.chat_template_kwargs)}
            if vllm.chat_template_kwargs
            else None
        ),
    )
    yield from processor(asked_rows(place)).iter_rows()


def asked_rows(place: str) -> "ray.data.Dataset":
    """The dataset of what is asked."""
    fs, path = storage.filesystem(place)
    return ray.data.read_parquet(path, filesystem=fs)


def row_out(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row that the engine has been at."""
    return {
        "key": row["key"],
        "about_item": row["about_item"],
        "text": row["generated_text"],
        "tokens_in": row["num_input_tokens"],
        "tokens_out": row["num_generated_tokens"],
    }
