"""A store described by a real small model, and by endpoints that fail in every way they can."""

import csv
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from distrl import storage
from distrl.data.side_tables import find_table, read_part
from distrl.data.store import read_item_ids, read_manifest
from distrl.errors import ConfigError, SchemaError, StorageError
from distrl.semantics.asked import Asked
from distrl.semantics.describe import describe
from distrl.semantics.describe_config import DescribeConfig, GenerationConfig
from distrl.semantics.prompts import Prompt, request_of
from distrl.semantics.replies import Replies
from distrl.semantics.vllm_engine import _write_missing, asked_rows, engine_row
from tests.conftest import SHARED_DATA
from tests.integration.llm_server import MODEL, Behavior, fault_server, llm_server
from tests.integration.s3_server import start_s3
from tests.integration.servers import job_process, run_job, write_config
from tests.store_factory import make_store

pytestmark = pytest.mark.slow

SEQUENCES = [[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 1], [6, 5, 4, 3, 2, 1], [1, 2, 5, 6]]
NUM_WINDOWS = 3 + 2 + 3 + 1
# [1] begins two histories, and is asked about once.
NUM_DIFFERENT = NUM_WINDOWS - 1


@pytest.fixture
def store(tmp_path):
    """Six items and four users, in two shards."""
    make_store(tmp_path / "store", SEQUENCES)
    lines = [{"item": f"item-{i}", "title": f"Title {i}", "text": f"text {i}"} for i in range(1, 7)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "store"


def settings_of(store: Path, base_url: str, **changes) -> dict:
    """Windows alone, one request at a time, quick retries."""
    settings = {
        "store_uri": str(store),
        "items": False,
        "item_texts": {"uri": str(store.parent / "items.jsonl")},
        "prompts": {"num_examples": 0},
        "generation": {"model": MODEL, "max_tokens_item": 20, "max_tokens_window": 20},
        "prices": {"input_per_million": 1.0, "output_per_million": 10.0},
        "endpoint": {
            "base_url": base_url,
            "api_key_env": "LLM_KEY",
            "concurrency": 1,
            "retries": 2,
            "first_wait_s": 0.02,
            "timeout_s": 5.0,
        },
    }
    for name, value in changes.items():
        inner = settings.get(name)
        settings[name] = {**inner, **value} if isinstance(inner, dict) else value
    return settings


@pytest.fixture
def described(store, monkeypatch):
    """Describes the store at a server, in this process."""

    def run(server, *, overwrite=False, say=lambda line: None, **changes):
        monkeypatch.setenv("LLM_KEY", server.key)
        config = DescribeConfig.model_validate(settings_of(store, server.base_url, **changes))
        return describe(config, overwrite=overwrite, say=say)

    return run


def kept(store: Path) -> int:
    replies = Replies(f"{store}/replies")
    replies.open()
    return len(replies)


def rows_of(store: Path, name: str = "llm") -> tuple[list[dict], list[dict]]:
    """Items and windows of a table, whose every part is as its manifest says."""
    table = find_table(str(store), "descriptions", name)
    assert table is not None
    return tuple(
        [row for part in parts for row in read_part(str(store), part).read().to_pylist()]
        for parts in (table.items, table.window_parts)
    )


def files_with(secret: str, *folders: Path) -> list[Path]:
    """Files below some folders that hold a secret; compressed tables are looked into."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3

    def content(path: Path) -> bytes:
        rows = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else ""
        return path.read_bytes() + rows.encode()

    return [path for path in files if secret.encode() in content(path)]


def assert_one_line_of(done: subprocess.CompletedProcess[str], secret: str) -> None:
    """A mistake of a user's: status 2, one line, no stack trace, no key."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert secret not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_movielens_is_prepared_and_described_by_a_real_model(tmp_path):
    log = tmp_path / "log.tsv"
    with (SHARED_DATA / "ml-latest-small/interactions.tsv").open() as source:
        rows = list(csv.DictReader(source, delimiter="\t"))
    counts: Counter[str] = Counter()
    lines = ["user\titem\ttimestamp"]
    for row in rows:
        counts[row["user"]] += 1
        if row["user"] in ("1", "9") and counts[row["user"]] <= 5:
            lines.append(f"{row['user']}\t{row['item']}\t{row['timestamp']}")
    log.write_text("\n".join(lines) + "\n")
    store = tmp_path / "store"
    prepare = {
        "store_uri": str(store),
        "source": {"uri": str(log), "format": "tsv"},
        "num_shards": 2,
    }
    done = run_job("jobs/prepare.py", write_config(prepare))
    assert done.returncode == 0, done.stderr
    with llm_server(tmp_path / "llm") as server:
        settings = settings_of(store, server.base_url)
        settings |= {
            "items": True,
            "reask": 0,
            "item_texts": {"uri": str(SHARED_DATA / "ml-latest-small/item_text.jsonl")},
            "prompts": {
                "window_system": "Name what this user of $domain likes.",
                "item_system": "You know $domain.",
                "item_user": "$attributes\n$examples\nDescribe it and who would watch it, as JSON.",
                "domain": "movies",
            },
            "generation": {
                "model": MODEL,
                "max_tokens_item": 60,
                "max_tokens_window": 12,
                "extra": {"cache_prompt": False},
                "extra_item": {"response_format": schema_of_items()},
            },
        }
        settings["endpoint"] |= {"concurrency": 2, "timeout_s": 120.0}
        config = write_config(settings)
        done = run_job("jobs/describe.py", config, environment=server.environment())
        assert done.returncode == 0, done.stderr
    said: list[str] = []
    assert describe(DescribeConfig.model_validate(settings), say=said.append).asked is None
    assert "already has descriptions/llm: nothing to do" in said[-1]
    manifest = read_manifest(str(store))
    items, windows = rows_of(store)
    titles = {
        str(line["item"]): line["title"]
        for line in map(
            json.loads, (SHARED_DATA / "ml-latest-small/item_text.jsonl").open().readlines()
        )
    }
    assert set(map(str, read_item_ids(str(store), manifest).to_pylist())) <= set(titles)
    assert [row["item_id"] for row in items] == list(range(1, manifest.num_items + 1))
    assert len(windows) == manifest.num_prefixes == 4
    assert all(row["text"].strip() for row in items + windows)
    assert {row["source"] for row in windows} == {"reply"}
    # The grammar of `response_format` makes even this model answer with both keys.
    by_reply = [row["text"] for row in items if row["source"] == "reply"]
    assert len(by_reply) >= manifest.num_items - 1
    assert not any("item summary" in text or "{" in text for text in by_reply)
    assert "find examples" in done.stdout
    assert f"{manifest.num_items + 4}/{manifest.num_items + 4} prompts" in done.stdout
    assert server.key not in done.stdout + done.stderr
    assert files_with(server.key, store, tmp_path / "llm") == []


def schema_of_items() -> dict:
    """An answer of llama.cpp's that must be JSON with both keys, and short."""
    text = {"type": "string", "minLength": 3, "maxLength": 30}
    keys = ["item summary", "potential user analysis"]
    schema = {"type": "object", "properties": dict.fromkeys(keys, text), "required": keys}
    return {"type": "json_schema", "json_schema": {"name": "item", "schema": schema}}


def test_a_killed_job_goes_on_and_asks_for_nothing_twice(store):
    killed = threading.Event()

    def script(number, request):
        # So that some are left whenever the kill comes.
        held = number >= 6 and not killed.is_set()
        return Behavior(text="likes", delay_s=0.25, hang=held)

    with fault_server(script) as server:
        config = write_config(settings_of(store, server.base_url))
        quiet, environment = subprocess.DEVNULL, server.environment()
        with job_process(
            "jobs/describe.py", config, environment=environment, stdout=quiet, stderr=quiet
        ) as job:
            deadline = time.monotonic() + 60
            while not list((store / "replies").glob("part-*.parquet")):
                assert time.monotonic() < deadline
                assert job.poll() is None
                time.sleep(0.02)
            os.kill(job.pid, signal.SIGKILL)
            assert job.wait(timeout=30) == -signal.SIGKILL
        killed.set()
        time.sleep(0.3)  # the server ends what it was at
        assert not (store / "descriptions").exists()
        before, had = len(server.requests), kept(store)
        assert 0 < had <= before < NUM_DIFFERENT
        # What is not kept came after the last file was begun, or was under way.
        assert before - had <= 4

        done = run_job("jobs/describe.py", config, environment=server.environment())
        assert done.returncode == 0, done.stderr
        assert len(server.requests) - before == NUM_DIFFERENT - had
        second = [request.user for request in server.requests[before:]]
        assert len(set(second)) == len(second)
        assert f"{had} replies are kept" in done.stdout
        assert len(rows_of(store)[1]) == NUM_WINDOWS
        assert files_with(server.key, store) == []


def test_a_wrong_key_is_one_request_and_one_line_without_the_key(store):
    with fault_server() as server:
        settings = settings_of(store, server.base_url, endpoint={"concurrency": 50})
        done = run_job(
            "jobs/describe.py", write_config(settings), environment={"LLM_KEY": "sk-wrong-one"}
        )
        assert len(server.requests) == 1
    assert_one_line_of(done, "sk-wrong-one")
    assert "refuses the key in LLM_KEY (401: " in done.stderr
    assert "Bearer ***" in done.stderr


def test_a_key_that_is_not_there_or_no_key_is_found_before_anything_is_asked(store, monkeypatch):
    config = DescribeConfig.model_validate(settings_of(store, "http://127.0.0.1:9/v1"))
    monkeypatch.delenv("LLM_KEY", raising=False)
    with pytest.raises(ConfigError, match="=LLM_KEY is not in the environment"):
        describe(config)
    monkeypatch.setenv("LLM_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="key in LLM_KEY has characters that") as caught:
        describe(config)
    assert "lines" not in str(caught.value)


@pytest.mark.parametrize(
    ("behavior", "kind", "said"),
    [
        (Behavior(500, b'{"error": {"message": "broken"}}'), "status 500", "500: .*broken"),
        (Behavior(503, b"<html>busy</html>"), "status 503", "503"),
        (Behavior(429, b"{}"), "status 429", "429"),
        (Behavior(200, b"<html>hello</html>"), "no completion", "18 bytes that are no chat"),
        (Behavior(200, b""), "no completion", "an empty body"),
        (Behavior(200, b'{"choices": [{"mess'), "no completion", "19 bytes that are no chat"),
        (Behavior(200, b'{"choices": []}'), "no completion", "15 bytes that are no chat"),
        (Behavior(200, b"[" * 200_000), "no completion", "200000 bytes that are no chat"),
        (Behavior(cut=True), "connection", "RemoteProtocolError"),
        (Behavior(hang=True), "timeout", r"no reply within endpoint\.timeout_s=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_endpoint_that_never_answers_ends_the_job_after_counted_requests(
    described, store, behavior, kind, said
):
    lines = []
    with fault_server(lambda number, request: behavior) as server:
        timeout_s = 1.0 if behavior.hang else 5.0
        endpoint = {"give_up_after": 2, "concurrency": 8, "timeout_s": timeout_s}
        with pytest.raises(StorageError, match=said) as caught:
            described(server, endpoint=endpoint, say=lines.append)
        assert len(server.requests) == 2 * 3  # two prompts, each sent once and twice again
        assert server.most_at_once == 1 or behavior.hang
        assert len({request.user for request in server.requests}) == 2
    assert "gave no reply to 2 prompts in a row" in str(caught.value)
    assert "0 replies of this run are kept" in str(caught.value)
    assert server.key not in str(caught.value)
    assert "6 failed" in lines[-1]
    assert kept(store) == 0
    assert find_table(str(store), "descriptions", "llm") is None


def test_failures_now_and_then_cost_retries_and_nothing_else(described, store):
    faults = {
        0: Behavior(500, b"{}"),
        2: Behavior(200, b"garbage"),
        3: Behavior(cut=True),
        5: Behavior(hang=True),
        7: Behavior(429, b"{}"),
    }
    with fault_server(lambda number, request: faults.get(number, Behavior(text="likes"))) as server:
        table, asked = described(server, endpoint={"timeout_s": 4.0})
        assert len(server.requests) == NUM_DIFFERENT + len(faults)
    assert (asked.asked, asked.repeated, asked.retries, asked.unanswered) == (8, 1, 5, 0)
    assert asked.failures == {
        "status 500": 1, "no completion": 1, "connection": 1, "timeout": 1, "status 429": 1,
    }  # fmt: skip
    assert (asked.tokens_in, asked.tokens_out) == (800, 80)
    assert asked.cost == pytest.approx(800e-6 + 800e-6)
    assert table.facts["windows_reply"] == NUM_WINDOWS
    assert (table.facts["tokens_in"], table.facts["tokens_out"]) == (800, 80)
    _, windows = rows_of(store)
    assert {(row["text"], row["source"]) for row in windows} == {("likes", "reply")}
    assert [(row["row"], row["length"]) for row in windows] == [
        (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (0, 1), (0, 2), (1, 1),
    ]  # fmt: skip


def test_retry_after_holds_all_requests(described):
    wait = Behavior(429, b"{}", headers={"Retry-After": "2"})
    with fault_server(lambda number, request: wait if number == 2 else Behavior()) as server:
        described(server, endpoint={"concurrency": 3})
        times = [request.at_s for request in server.requests]
    assert len(times) == NUM_DIFFERENT + 1
    # Three may be under way when the answer to the third comes; then none for two seconds.
    assert max(later - sooner for sooner, later in pairwise(times)) > 1.6
    assert sum(at < times[2] + 1.6 for at in times) <= 6


def test_a_server_that_asks_for_longer_than_the_longest_wait_is_asked_again_after_that(described):
    wait = Behavior(429, b"{}", headers={"Retry-After": "3600"})
    with fault_server(lambda number, request: wait) as server:
        lines = []
        with pytest.raises(StorageError, match="gave no reply to 1 prompts in a row"):
            described(
                server, endpoint={"give_up_after": 1, "max_wait_s": 0.3}, say=lines.append
            )  # fmt: skip
        times = [request.at_s for request in server.requests]
    assert len(times) == 3
    assert min(later - sooner for sooner, later in pairwise(times)) > 0.29


@pytest.mark.parametrize(
    ("behavior", "said"),
    [
        (Behavior(402, b'{"error": {"message": "pay"}}'), "the account at .* is spent"),
        (Behavior(404, b'{"error": {"message": "no"}}'), "knows no generation.model=smollm2"),
        (
            Behavior(429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'),
            "the account at .* is spent",
        ),
    ],
)
def test_what_no_retry_can_mend_ends_the_job_at_once(described, behavior, said):
    with fault_server(lambda number, request: behavior) as server:
        with pytest.raises(ConfigError, match=said):
            described(server, endpoint={"concurrency": 20})
        assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there_is_named(described):
    with fault_server() as server:
        pass
    with pytest.raises(StorageError, match=r"gave no reply to 1 prompts in a row.*Connect"):
        described(server, endpoint={"give_up_after": 1})


def test_a_refused_prompt_is_left_raw_and_the_others_described(described, store):
    def script(number, request):
        refused = request.user == "<Title 2>; <Title 3>"
        return Behavior(400, b'{"error": {"message": "filtered"}}') if refused else Behavior()

    with fault_server(script) as server:
        table, asked = described(server)
        assert len(server.requests) == NUM_DIFFERENT
        assert (asked.asked, asked.unanswered, asked.retries) == (7, 1, 0)
        assert (table.facts["windows_reply"], table.facts["windows_raw"]) == (8, 1)
        raw = [row for row in rows_of(store)[1] if row["source"] == "raw"]
        assert [row["text"] for row in raw] == ["<Title 2>; <Title 3>"]
        _, asked = described(server, overwrite=True)
        assert (asked.from_cache, asked.unanswered) == (8, 1)
        assert len(server.requests) == NUM_DIFFERENT + 1


def test_refused_prompts_in_a_row_end_no_run_in_which_others_are_answered(described, store):
    def script(number, request):
        refused = request.user != "<Title 6>"
        return Behavior(400, b'{"error": {"message": "filtered"}}') if refused else Behavior()

    with fault_server(script) as server:
        # Nothing was ever answered: it may be the parameters that it refuses.
        with pytest.raises(StorageError, match="gave no reply to 2 prompts in a row"):
            described(server, endpoint={"give_up_after": 2})
        # The one that is answered comes sixth.
        _, asked = described(server, endpoint={"give_up_after": 20})
        assert (asked.asked, asked.unanswered) == (1, NUM_DIFFERENT - 1)
        # Now nothing is left to be asked but what is refused.
        _, asked = described(server, endpoint={"give_up_after": 2}, overwrite=True)
        assert (asked.asked, asked.unanswered) == (0, NUM_DIFFERENT - 1)
    assert kept(store) == 1


def test_403_is_a_refused_key_until_something_was_answered_and_then_a_refused_prompt(
    described, store
):
    no = Behavior(403, b'{"error": {"message": "flagged"}}')
    with fault_server(lambda number, request: no) as server:
        with pytest.raises(ConfigError, match=r"refuses the key in LLM_KEY, or 3 prompts in a row"):
            described(server, endpoint={"give_up_after": 3})
        assert len(server.requests) == 3
    with fault_server(lambda number, request: no if number else Behavior()) as server:
        _, asked = described(server, endpoint={"give_up_after": 3})
        assert (asked.asked, asked.unanswered) == (1, NUM_DIFFERENT - 1)
    # Replies that are kept say nothing of the key that is used now.
    with (
        fault_server(lambda number, request: no) as server,
        pytest.raises(ConfigError, match="refuses the key in LLM_KEY"),
    ):
        described(server, endpoint={"give_up_after": 3}, overwrite=True)


def test_what_is_in_flight_when_a_run_ends_is_waited_for_and_kept(described, store):
    refused = Behavior(404, b'{"error": {"message": "gone"}}')

    def script(number, request):
        return refused if number == 4 else Behavior(delay_s=0.5 if number else 0.0)

    with fault_server(script) as server:
        with pytest.raises(ConfigError, match=r"knows no generation\.model.*7 replies of this run"):
            described(server, endpoint={"concurrency": 7})
        assert len(server.requests) == 8
    assert kept(store) == 7


def test_who_waits_for_a_turn_when_a_run_ends_sends_nothing_any_more(described):
    refused = Behavior(404, b'{"error": {"message": "gone"}}')
    with fault_server(lambda number, request: refused if number == 1 else Behavior()) as server:
        with pytest.raises(ConfigError, match=r"knows no generation\.model"):
            described(server, endpoint={"concurrency": 8, "requests_per_minute": 60})
        # Turns are a second apart; without a look at the end all eight would be sent.
        assert len(server.requests) <= 3


def test_a_write_that_fails_now_and_then_ends_nothing(described, store, monkeypatch):
    write, failures, lines = storage.write_bytes, [], []

    def sometimes(uri, content):
        if "/replies/part-" in uri and len(failures) < 2:
            failures.append(uri)
            raise StorageError(f"cannot write {uri}: slow down")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", sometimes)
    with fault_server(lambda number, request: Behavior(delay_s=0.3)) as server:
        _, asked = described(server, say=lines.append)
    assert (len(failures), asked.asked) == (2, NUM_DIFFERENT)
    assert "replies could not be written, 2 of 5 times" in "".join(lines)
    assert kept(store) == NUM_DIFFERENT


def test_the_budget_counts_replies_that_were_made_and_did_not_arrive(described, store):
    faults = {0: Behavior(hang=True), 2: Behavior(cut=True), 4: Behavior(200, b"garbage")}
    with fault_server(
        lambda number, request: faults.get(number, Behavior(tokens=(100, 20)))
    ) as server:
        endpoint = {"timeout_s": 2.0, "retries": 5}
        with pytest.raises(ConfigError, match=r"up to \d+ tokens in requests without a reply"):
            described(server, endpoint=endpoint, budget={"max_tokens": 500})
        # A prompt's estimate and its longest reply are above 100 tokens, thrice: 500 hold no more
        # than one reply of 120 besides.
        assert len(server.requests) <= 5


def test_replies_are_judged_anew_under_other_keys_and_only_what_is_malformed_is_asked(
    described, store
):
    old = '{"summary": "a", "users": "b"}'
    with fault_server(lambda number, request: Behavior(text=old)) as server:
        settings = {"items": True, "windows": "none"}
        lines = []
        table, asked = described(server, say=lines.append, **settings)
        assert (asked.asked, asked.reasked, asked.malformed) == (6, 6, 12)
        assert "12 malformed" in "".join(lines)
        assert table.facts["items_raw"] == 6
        prompts = {"item_keys": ["summary", "users"]}
        table, asked = described(server, prompts=prompts, overwrite=True, **settings)
        assert (asked.from_cache, asked.asked, asked.reasked) == (6, 0, 0)
        assert (table.facts["items_reply"], table.facts["items_raw"]) == (6, 0)
        assert [row["text"] for row in rows_of(store)[0]] == ["a b"] * 6


def test_malformed_replies_are_asked_again_and_then_replaced_by_raw_text(described, store):
    good = '{"item summary": "fine", "potential user analysis": "all"}'
    replies = {1: ["no", good], 2: ["no", "```" + good], 3: ["no", "no", "no"], 4: [""] * 3}
    seen: Counter[int] = Counter()

    def script(number, request):
        item = next(i for i in range(1, 7) if f"title: Title {i};" in request.user)
        said = replies.get(item, [good])
        seen[item] += 1
        return Behavior(text=said[seen[item] - 1])

    with fault_server(script) as server:
        table, asked = described(server, items=True, windows="none", reask=2)
        bodies = [request.body for request in server.requests]
        assert seen == {1: 2, 2: 2, 3: 3, 4: 3, 5: 1, 6: 1}
        assert (asked.asked, asked.reasked, asked.unanswered) == (6, 6, 0)
        assert (table.facts["items_reply"], table.facts["items_raw"]) == (4, 2)
        assert [row["text"] for row in rows_of(store)[0]] == [
            "fine all", "fine all", "text 3", "text 4", "fine all", "fine all",
        ]  # fmt: skip
        assert {body["temperature"] for body in bodies[:1]} == {0.0}
        assert Counter(body["temperature"] for body in bodies) == {0.0: 6, 0.7: 6}
        _, asked = described(server, items=True, windows="none", reask=2, overwrite=True)
        assert (asked.from_cache, asked.asked, asked.reasked) == (6, 0, 0)
        assert len(server.requests) == 12


def test_a_spent_budget_ends_with_what_is_kept_and_how_to_go_on(store, described):
    # A request is sent if its estimate fits: about 120 tokens of prompt and 20 of reply at most.
    with fault_server(lambda number, request: Behavior(text="likes", tokens=(100, 10))) as server:
        settings = settings_of(store, server.base_url, budget={"max_tokens": 500})
        config = write_config(settings)
        done = run_job("jobs/describe.py", config, environment=server.environment())
        first = len(server.requests)
        assert_one_line_of(done, server.key)
        assert "budget.max_tokens=500 leave no room for another request" in done.stderr
        assert f"this run used {100 * first} + {10 * first} tokens" in done.stderr
        assert f"{first} replies of this run are kept in {store}/replies" in done.stderr
        assert "the same command goes on" in done.stderr
        assert 110 * first <= 500
        assert first >= 2
        assert kept(store) == first
        assert find_table(str(store), "descriptions", "llm") is None
        _, asked = described(server)
        assert len(server.requests) == NUM_DIFFERENT
        # The prompt that comes twice is among those that are kept.
        assert (asked.asked, asked.from_cache) == (NUM_DIFFERENT - first, first + 1)


def test_a_budget_of_money_is_never_passed_with_many_requests_at_once(described, store):
    with fault_server(
        lambda number, request: Behavior(text="likes", tokens=(100, 20), delay_s=0.05)
    ) as server:
        # A prompt and a reply cost 100 * 1 + 20 * 10 = 300 of a millionth.
        with pytest.raises(ConfigError, match=r"budget\.max_cost=0\.001 leave no room"):
            described(server, budget={"max_cost": 0.001}, endpoint={"concurrency": 8})
        assert len(server.requests) == 3
    assert kept(store) == 3


def test_requests_in_flight_and_a_minute_are_bounded(described):
    with fault_server(lambda number, request: Behavior(delay_s=0.15)) as server:
        described(server, endpoint={"concurrency": 3})
        assert server.most_at_once == 3
        assert len(server.requests) == NUM_DIFFERENT
    with fault_server() as server:
        described(
            server, overwrite=True, name="slow",
            generation={"model": "other"},
            endpoint={"concurrency": 8, "requests_per_minute": 200},
        )  # fmt: skip
        times = [request.at_s for request in server.requests]
        assert len(times) == NUM_DIFFERENT
        assert times[-1] - times[0] > (NUM_DIFFERENT - 1) * 0.3 - 0.3


def test_tokens_a_minute_are_bounded(described):
    with fault_server(lambda number, request: Behavior(tokens=(100, 20))) as server:
        described(server, endpoint={"concurrency": 8, "tokens_per_minute": 20_000})
        times = [request.at_s for request in server.requests]
    # 120 tokens at 333 a second; the first few waited for their estimates, which were larger.
    assert times[-1] - times[0] > (NUM_DIFFERENT - 1) * 0.36 - 0.36


def test_a_finished_table_is_found_and_other_settings_need_overwrite(described, store):
    with fault_server() as server:
        described(server)
        assert described(server).asked is None
        assert len(server.requests) == NUM_DIFFERENT
        with pytest.raises(ConfigError, match=r"made with max_len=20, not 2: --overwrite"):
            described(server, max_len=2)
        with pytest.raises(ConfigError, match=r"made with generation\.max_tokens_window=20, not 9"):
            described(server, generation={"max_tokens_window": 9})
        items = store.parent / "items.jsonl"
        items.write_text(items.read_text().replace("Title 3", "Title Three"))
        with pytest.raises(ConfigError, match=r"made with item_texts\.sha256="):
            described(server)
        _, asked = described(server, overwrite=True)
        # Two windows show item 3.
        assert (asked.asked, asked.from_cache) == (2, 7)
        part = find_table(str(store), "descriptions", "llm").window_parts[0]
        (store / part.path).write_bytes(b"torn")
        with pytest.raises(SchemaError, match=r"windows/part-00000\.parquet has 4 bytes"):
            described(server)
        _, asked = described(server, overwrite=True)
        assert asked.asked == 0


def test_windows_of_held_out_inputs_and_last_ones(described, store):
    with fault_server() as server:
        table, _ = described(server, held_out=True)
        assert table.held_out
        assert len(rows_of(store)[1]) == sum(len(sequence) - 1 for sequence in SEQUENCES)
        described(server, windows="last", name="last", max_len=2)
    assert [(row["row"], row["length"]) for row in rows_of(store, "last")[1]] == [
        (0, 3), (1, 3), (0, 2), (1, 1),
    ]  # fmt: skip
    shown = {request.user for request in server.requests}
    assert "<Title 2>; <Title 3>" in shown  # the last two of [1, 2, 3]


def test_store_and_replies_may_lie_on_s3(store, tmp_path, monkeypatch):
    with start_s3(tmp_path / "s3") as s3, fault_server() as server:
        bucket = s3.create_bucket("texts")
        for path in sorted(store.rglob("*")):
            if path.is_file():
                s3.client().upload_file(str(path), "texts", f"store/{path.relative_to(store)}")
        for name, value in {**s3.environment(), **server.environment()}.items():
            monkeypatch.setenv(name, value)
        settings = settings_of(store, server.base_url, store_uri=f"{bucket}/store")
        config = DescribeConfig.model_validate(settings)
        table, asked = describe(config)
        assert asked is not None
        assert asked.asked == NUM_DIFFERENT
        assert table.facts["windows_reply"] == NUM_WINDOWS
        parts = [read_part(config.store_uri, part).read() for part in table.window_parts]
        assert sum(part.num_rows for part in parts) == NUM_WINDOWS
        _, asked = describe(config, overwrite=True)
        assert asked is not None
        assert (asked.asked, asked.from_cache) == (0, NUM_WINDOWS)
        assert len(server.requests) == NUM_DIFFERENT


def test_vllm_that_is_missing_is_said_before_anything_is_done(store):
    settings = settings_of(store, "http://127.0.0.1:9/v1", engine="vllm")
    with pytest.raises(ConfigError, match="engine=vllm needs the package vllm"):
        describe(DescribeConfig.model_validate(settings))
    assert not (store / "replies").exists()


def test_ray_data_hands_the_engine_the_rows_that_are_missing(tmp_path):
    """All of the way to vLLM but vLLM: through files, Ray Data and the engine's own first step."""
    system = {"role": "system", "content": "s"}
    generation = GenerationConfig(model="org/m", extra_item={"seed": 3})
    prompts = [
        Prompt((system, {"role": "user", "content": f"u{i}"}), i < 2, "raw") for i in range(4)
    ]
    settings = settings_of(tmp_path, "http://127.0.0.1:9/v1", engine="vllm")
    settings["generation"] = generation.model_dump()
    config, asked = DescribeConfig.model_validate(settings), Asked(total=4)
    replies = Replies(str(tmp_path / "replies"))
    place = str(tmp_path / "asking")
    counts = _write_missing(config, iter([prompts]), replies, 0, asked, place)
    assert counts == {"items": 2, "windows": 2}
    with tempfile.TemporaryDirectory(prefix="vllm-", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
                 _temp_dir=folder)  # fmt: skip
        try:
            of_kinds = [
                asked_rows(f"{place}/{kind}").map(engine_row).take_all()
                for kind in ("items", "windows")
            ]
        finally:
            ray.shutdown()
    for some in of_kinds:
        some.sort(key=lambda row: row["messages"][1]["content"])
    rows = [*of_kinds[0], *of_kinds[1]]
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        request = request_of(prompt, generation, 0)
        assert (row["key"], row["about_item"]) == (request.key, prompt.about_item)
        assert list(row["messages"]) == list(prompt.messages)
        assert row["sampling_params"]["max_tokens"] == request.max_tokens
        # Arrow would fill it with None where items and windows shared a block.
        assert row["sampling_params"].get("seed", "none") == (3 if number < 2 else "none")
