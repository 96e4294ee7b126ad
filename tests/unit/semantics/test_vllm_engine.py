import importlib.util

import pyarrow.parquet as pq
import pytest

from distrl.errors import ConfigError
from distrl.semantics.asked import Asked
from distrl.semantics.describe_config import DescribeConfig, GenerationConfig
from distrl.semantics.prompts import Prompt, request_of
from distrl.semantics.replies import Replies, Reply
from distrl.semantics.vllm_engine import (
    _write_missing,
    check_vllm,
    engine_row,
    reply_of,
    row_in,
    row_out,
    sampling_params,
)

KEYS = ("item summary", "potential user analysis")
GENERATION = GenerationConfig(model="org/model", max_tokens_item=50, extra_item={"seed": 3})


def prompt(number, *, about_item=True):
    messages = (
        {"role": "system", "content": "Assume."},
        {"role": "user", "content": f"item {number} \u00e9"},
    )
    return Prompt(messages, about_item, f"raw {number}")


def test_vllm_that_is_not_installed_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="engine=vllm needs the package vllm"):
        check_vllm()


def test_a_row_that_goes_in_has_what_the_engine_reads():
    request = request_of(prompt(1), GENERATION, 0)
    assert engine_row(row_in(request, True)) == {
        "key": request.key,
        "about_item": True,
        "messages": list(prompt(1).messages),
        "sampling_params": {"max_tokens": 50, "temperature": 0.0, "top_p": 0.001, "seed": 3},
    }
    renamed = GenerationConfig(model="m", max_tokens_name="max_completion_tokens")
    named = sampling_params(request_of(prompt(1), renamed, 0))
    assert named == {"max_tokens": 400, "temperature": 0.0, "top_p": 0.001}


@pytest.mark.parametrize(
    ("about_item", "text", "malformed"),
    [
        (True, '{"item summary": "a", "potential user analysis": "b"}', False),
        (True, "I cannot.", True),
        (False, "Likes ants.", False),
        (False, " ", True),
    ],
)
def test_a_row_that_comes_out_is_a_reply(about_item, text, malformed):
    engine = {
        "key": "ab" * 32,
        "about_item": about_item,
        "messages": [],
        "generated_text": text,
        "num_input_tokens": 12,
        "num_generated_tokens": 5,
        "__inference_error__": "",
    }
    out = {**row_out(engine), "__inference_error__": ""}
    expected = Reply("ab" * 32, "org/model", malformed, text, 12, 5)
    assert reply_of(out, GENERATION, KEYS) == expected


def test_a_row_that_the_engine_failed_at_is_no_reply():
    failed = {"__inference_error__": "ValueError: prompt too long", "prompt": "...", "key": None}
    assert reply_of(failed, GENERATION, KEYS) is None


def test_only_what_is_missing_is_written_and_each_request_once(tmp_path):
    config = DescribeConfig.model_validate(
        {
            "store_uri": str(tmp_path),
            "engine": "vllm",
            "item_texts": {"uri": "x"},
            "generation": GENERATION.model_dump(),
        }
    )
    replies = Replies(str(tmp_path / "replies"))
    replies.open()

    def keep(number, attempt, *, malformed):
        key = request_of(prompt(number), config.generation, attempt).key
        said = "text" if malformed else '{"item summary": "a", "potential user analysis": "b"}'
        replies.add(Reply(key, "org/model", malformed, said, 1, 1))

    keep(1, 0, malformed=False)
    keep(2, 0, malformed=True)
    replies.flush()
    replies.open()
    blocks = [[prompt(1), prompt(2), prompt(3)], [prompt(3), prompt(4)]]
    asked, place = Asked(total=5), str(tmp_path / "replies" / "asking")

    def users(attempt):
        written = _write_missing(config, iter(blocks), replies, attempt, asked, place)
        rows = pq.read_table(tmp_path / "replies/asking/items/part-00000.parquet").to_pylist()
        assert written == {"items": len(rows), "windows": 0}
        return [engine_row(row)["messages"][1]["content"] for row in rows]

    assert users(0) == ["item 3 \u00e9", "item 4 \u00e9"]
    assert (asked.prompts, asked.from_cache, asked.repeated) == (5, 1, 1)
    keep(3, 0, malformed=True)
    keep(4, 0, malformed=False)
    replies.flush()
    replies.open()
    assert users(1) == ["item 2 \u00e9", "item 3 \u00e9"]
    assert (asked.prompts, asked.from_cache, asked.repeated) == (5, 1, 1)
