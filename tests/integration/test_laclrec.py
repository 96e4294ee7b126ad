"""LACLRec under Ray: two stages, a worker killed in each of them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from distrl.data.store import read_manifest
from tests.integration.finished_runs import assert_each_row_once, last_checkpoint, only_run
from tests.integration.servers import job_process, run_job, small_run, write_config
from tests.integration.test_faults import training_workers
from tests.store_factory import make_store

pytestmark = pytest.mark.slow

EPOCHS, PRETRAIN_EPOCHS, NUM_USERS, NUM_ITEMS = 4, 2, 3000, 60
KILLS = 2
FIGURES = (
    *("keep_share", "delete_share", "insert_share", "reinserted", "reinserted_precision"),
    *("random_unchanged_share", "learned_unchanged_share"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laclrec")
    sequences = [
        [1 + (7 * user + place) % NUM_ITEMS for place in range(5 + user % 6)]
        for user in range(NUM_USERS)
    ]
    make_store(folder / "store", sequences, num_shards=4)
    texts = [{"item": f"item-{i}", "title": f"Balm {i}"} for i in range(1, NUM_ITEMS + 1)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder


def settings(folder: Path) -> dict:
    run = small_run("stages", str(folder / "store"), str(folder / "runs"), "")
    run["data"]["item_text_uri"] = str(folder / "texts.jsonl")
    run["tracking"] = {}
    run["evaluation"] = {"num_workers": 0, "cpus_per_worker": 0.5}
    run["workers"]["max_failures"] = 3
    run["training"] |= {"epochs": EPOCHS, "checkpoint_every_steps": 15, "patience": None}
    run["method"] |= {"name": "laclrec", "pretrain_epochs": PRETRAIN_EPOCHS}
    return run


def progress(run_folder: Path) -> float:
    """Epochs of the newest checkpoint."""
    texts = [path.read_text() for path in run_folder.glob("*/progress.json")]
    # A file of a checkpoint that is being uploaded may still be empty.
    return max((json.loads(text)["epoch"] for text in texts if text.endswith("}")), default=0.0)


def kill_a_worker_after(epoch: float, run_folder: Path, process: subprocess.Popen, log: Path):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, f"training ended too early: {log.read_text()[-3000:]}"
        workers = training_workers(process.pid)
        if progress(run_folder) > epoch and len(workers) == 2:
            os.kill(workers[1].pid, signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint after epoch {epoch}: {log.read_text()[-3000:]}")


def assert_pages_of_examples_have_titles(runs: Path):
    """One page at the end of each stage, of items by their titles alone."""
    pages = {page.name: page.read_text() for page in runs.glob("mlartifacts/*/*/augmenter/*")}
    assert set(pages) == {f"examples-epoch-{end:03d}.md" for end in (PRETRAIN_EPOCHS, EPOCHS)}
    for page in pages.values():
        assert "## Histories" in page
        assert "## Damaged histories" in page
        shown = [line.split(". ", 1)[1] for line in page.splitlines() if line[:1].isdigit()]
        items = {item.strip("~*+ ") for line in shown for item in line.split(" / ")}
        assert items <= {f"Balm {i}" for i in range(1, NUM_ITEMS + 1)}
        assert len(items) > NUM_ITEMS / 2


def test_a_worker_killed_in_each_stage_costs_nothing_and_doubles_nothing(folder):
    run, run_folder, log = settings(folder), folder / "runs" / "stages", folder / "log"
    command = ["jobs/train_laclrec.py", write_config(run)]
    with log.open("a") as out, job_process(*command, stdout=out) as process:
        kill_a_worker_after(0.0, run_folder, process, log)
        kill_a_worker_after(PRETRAIN_EPOCHS + 0.1, run_folder, process, log)
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]

    manifest = read_manifest(str(folder / "store"))
    assert_each_row_once(run_folder, manifest, EPOCHS)
    last, found = last_checkpoint(run_folder), only_run(folder / "runs" / "mlflow.db")
    for key in ("augmenter/operation", "recommender/next_item", "augmenter/delete_recall"):
        assert found[key] == sorted(set(found[key])), f"a point of {key} is there twice"
    assert max(found["augmenter/operation"]) < min(found["recommender/next_item"]) + 15
    # Every epoch is judged, at its end and nowhere else. A worker that dies between an epoch's end
    # and its checkpoint lets that end come again, some steps off: ranks share its rows anew.
    judged = found["augmenter/delete_recall"]
    an_epoch = judged[-1] / EPOCHS
    ends = [round(step / an_epoch) for step in judged]
    assert sorted(set(ends)) == list(range(1, EPOCHS + 1))
    assert len(judged) <= EPOCHS + KILLS
    assert all(abs(step - end * an_epoch) <= 3 for step, end in zip(judged, ends, strict=True))
    assert {name: found[f"augmenter/{name}"] for name in FIGURES} == dict.fromkeys(FIGURES, judged)
    assert min(found["val/ndcg_at_10"]) > max(found["augmenter/operation"]) - 15
    assert_pages_of_examples_have_titles(folder / "runs")

    # Each part was stepped in its own stage alone, and its optimizer outlived the other.
    steps = {}
    for part in ("encoder", "augmenter", "recommender"):
        with safe_open(last / f"optimizer-{part}.safetensors", framework="pt") as file:
            steps[part] = float(file.get_tensor("step"))
    assert steps["augmenter"] > 0
    assert steps["recommender"] > 0
    assert steps["encoder"] == steps["augmenter"] + steps["recommender"]


def test_a_run_that_patience_ends_shows_examples_and_titles_that_are_torn_do_not_end_it(folder):
    run, log = settings(folder), folder / "torn-log"
    titles = folder / "torn.jsonl"
    titles.write_text('{"item": "item-1", "title": "Balm 1"}\n{"item": "item-2", "tit')
    run |= {"name": "torn", "storage_uri": str(folder / "torn")}
    run["data"]["item_text_uri"] = str(titles)
    run["workers"]["num_workers"] = 1
    run["engine"] = {"lr": 1e-9}  # nothing gets better
    run["method"]["pretrain_epochs"] = 1
    # Far more epochs than pass before the second validation is there, which may take its time.
    run["training"] |= {"epochs": 60, "patience": 1, "checkpoint_every_steps": None}
    with (
        log.open("w") as out,
        job_process("jobs/train_laclrec.py", write_config(run), stdout=out) as process,
    ):
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert "warning: examples show ids and no titles: data.item_text_uri=" in said
    assert "line 2 is no JSON object" in said
    assert "parameters: encoder" in said
    validations = json.loads((folder / "torn" / "torn" / "validations.json").read_text())
    last = max(round(entry["epoch"]) for entry in validations.values())
    assert last < 60
    pages = {p.name: p.read_text() for p in (folder / "torn").glob("mlartifacts/*/*/augmenter/*")}
    assert set(pages) == {f"examples-epoch-{end:03d}.md" for end in (1, last)}
    assert all("item-7" in page and "Balm" not in page for page in pages.values())

    # Cut off before its result was written, it is concluded: not trained on, nor registered again.
    (folder / "torn" / "torn" / "result.json").unlink()
    before = {path.name for path in (folder / "torn" / "torn").glob("checkpoint-*")}
    again = run_job("jobs/train_laclrec.py", write_config(run), "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "registered road version 1" in said
    assert "registered road version 1" in again.stdout
    assert {path.name for path in (folder / "torn" / "torn").glob("checkpoint-*")} == before
    assert validations == json.loads((folder / "torn" / "torn" / "validations.json").read_text())
    assert (folder / "torn" / "torn" / "result.json").exists()
