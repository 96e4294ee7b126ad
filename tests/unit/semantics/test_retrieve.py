from pathlib import Path

import numpy as np
import pytest

from distrl.config import load_config
from distrl.data.side_tables import find_table, write_manifest
from distrl.errors import ConfigError, SchemaError
from distrl.semantics.retrieve import _made_with, retrieve
from distrl.semantics.retrieve_config import RetrieveConfig
from tests.embeddings_factory import make_embeddings
from tests.store_factory import make_store

CONFIGS = Path(__file__).parents[3] / "configs" / "retrieve"
SEQUENCES = [[1, 2, 3, 4, 5], [1, 2, 3], [5, 4, 3, 2]]


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path, SEQUENCES, num_shards=1)
    make_embeddings(str(tmp_path), np.eye(5, 3), lambda shard, row, length: [1, 2, 3])
    return str(tmp_path)


def refused(store, error=ConfigError, **settings):
    config = RetrieveConfig(store_uri=store, **{"embeddings": "e", **settings})
    with pytest.raises(error) as caught:
        retrieve(config, connect=lambda: pytest.fail("Ray is not needed to see this"))
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    config = load_config(RetrieveConfig, path, [])
    assert config.store_uri == f"data/stores/{path.stem}"
    assert config.table == "minilm"


def test_auto_is_exact_up_to_a_number_of_vectors():
    config = RetrieveConfig(store_uri="s", embeddings="e", exact_up_to=10_000)
    assert config.resolved(10_000).knobs == {"index": "exact"}
    knobs = {
        "index": "ivf",
        "num_lists": 200,
        "num_probes": 16,
        "most_more": 64,
        "vectors_per_index": 20_000_000,
    }
    assert config.resolved(10_001).knobs == knobs
    million = config.resolved(1_000_000)
    assert (million.num_lists, million.num_probes) == (2000, 62)
    halves = config.model_copy(update={"vectors_per_index": 500_000})
    assert halves.resolved(1_000_000).num_lists == 1414
    assert config.model_copy(update={"num_probes": 3}).resolved(1_000_000).num_probes == 3
    hnsw = RetrieveConfig(store_uri="s", embeddings="e", index="hnsw", num_links=8)
    assert hnsw.resolved(5).knobs["num_links"] == 8


def test_probes_are_doubled_up_to_all_cells():
    config = RetrieveConfig(store_uri="s", embeddings="e", index="ivf", num_lists=40)
    probes, wider = [], config.resolved(400)
    while wider is not None:
        probes.append(wider.num_probes)
        wider = wider.wider()
    assert probes == [16, 32, 40]
    for index in ("hnsw", "exact"):
        assert config.model_copy(update={"index": index}).resolved(400).wider() is None


def test_a_table_of_too_low_a_recall_is_not_what_is_asked_for(store):
    config = RetrieveConfig(store_uri=store, embeddings="e", index="ivf", min_recall=0.8)
    embeddings = find_table(store, "embeddings", "e")
    there = embeddings.model_copy(
        update={
            "kind": "neighbors",
            "made_with": _made_with(config, embeddings),
            "facts": {"items_recall": 1.0, "windows_recall": 0.85},
            "items": (),
            "window_parts": (),
        }
    )
    write_manifest(store, "e", there)
    assert retrieve(config, connect=lambda: pytest.fail("it is made")) == there
    said = refused(store, index="ivf", min_recall=0.9)
    assert "with 0.85 of the nearest windows, below min_recall=0.9: --overwrite" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("embeddings=../e", "embeddings='../e'"),
        ("index=flat", "index='flat'"),
        ("min_recall=1.5", "min_recall=1.5"),
        ("num_neighbors=0", "num_neighbors=0"),
        ("num_probe=3", "num_probe: unknown key (did you mean num_probes?)"),
    ],
)
def test_a_wrong_value_is_named(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(RetrieveConfig, CONFIGS / "beauty.yaml", [override])
    assert said in str(caught.value)


def test_a_table_that_is_not_there_is_named_with_the_command_that_makes_it(store):
    said = refused(store, embeddings="minilm")
    assert f"no finished {store}/embeddings/minilm" in said
    assert f"jobs/embed.py configs/embed/... store_uri={store} name=minilm" in said


def test_held_out_neighbors_need_held_out_vectors(store):
    assert "embed again with windows.held_out=true" in refused(store, held_out=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"store_hash": "0" * 64}, "made of another store"),
        ({"window_parts": ()}, "has 0 parts of windows, its store 1 shards"),
        ({"items": ()}, "has 0 items, its store 5"),
    ],
)
def test_vectors_of_another_store_are_refused(store, changed, said):
    table = find_table(store, "embeddings", "e")
    write_manifest(store, "e", table.model_copy(update=changed))
    assert said in refused(store, SchemaError)


def test_a_missing_part_is_named(store):
    table = find_table(store, "embeddings", "e")
    Path(store, table.window_parts[0].path).unlink()
    assert f"{table.window_parts[0].path} has no bytes" in refused(store, SchemaError)
