"""SRA-CL under Ray: neighbors joined by readers, a worker killed, and tables that do not fit."""

import pytest

from tests.integration.finished_runs import assert_each_row_once, last_checkpoint, only_run
from tests.integration.servers import (
    job_process,
    run_job,
    small_run,
    write_config,
)
from tests.integration.test_laclrec import kill_a_worker_after
from tests.neighbor_store import neighbor_store

pytestmark = pytest.mark.slow

EPOCHS, NUM_USERS, K, MAX_LEN, TEXT = 3, 1500, 4, 8, 16


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sracl")
    lengths = [4 + user % 8 for user in range(NUM_USERS)]
    manifest, _, _ = neighbor_store(
        folder / "store",
        lengths,
        k=K,
        max_len=MAX_LEN,
        dimension=TEXT,
        num_shards=4,
        row_group_rows=64,
    )
    return folder, manifest


def settings(folder, name, base):
    run = small_run(name, str(folder / "store"), str(folder / "runs"), "")
    run["tracking"] = {}
    run["evaluation"] = {"num_workers": 0, "cpus_per_worker": 0.5}
    run["workers"]["max_failures"] = 2
    run["training"] |= {"epochs": EPOCHS, "checkpoint_every_steps": 10, "patience": None}
    run["data"] |= {
        "neighbors": "near",
        "num_neighbors": K,
        "max_len": MAX_LEN,
        "contrasted_prefixes": 2,
    }
    sizes = {"hidden_size": 16, "inner_size": 16, "dropout": 0.1}
    run["method"] = {"name": "sracl", "text_size": TEXT, "base": {"name": base, **sizes}}
    return run


def test_a_killed_worker_costs_nothing_and_neighbors_come_back_with_the_rows(near):
    folder, manifest = near
    run, run_folder, log = (
        settings(folder, "near", "mclrec"),
        folder / "runs" / "near",
        folder / "log",
    )
    run["method"]["base"] |= {"model_weight": 0.1, "steps_per_batch": 3}
    command = ["jobs/train_sracl.py", write_config(run)]
    with log.open("a") as out, job_process(*command, stdout=out) as process:
        kill_a_worker_after(0.3, run_folder, process, log)
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]

    assert_each_row_once(run_folder, manifest, EPOCHS)
    found = only_run(folder / "runs" / "mlflow.db")
    for key in ("encoder/inter_user", "encoder/intra_user", "encoder_again/inter_user"):
        assert found[key] == sorted(set(found[key])), f"a point of {key} is there twice"
    assert "augmenters/inter_user" not in found
    assert {"views/semantic/alignment", "views/synthesized/alignment"} <= set(found)
    assert (last_checkpoint(run_folder) / "optimizer-synthesizer.safetensors").exists()


def test_a_table_that_does_not_fit_is_one_line_before_ray_starts(near):
    folder, _ = near
    run = settings(folder, "wrong", "sasrec")
    run["data"]["max_len"] = 9
    done = run_job("jobs/train_sracl.py", write_config(run))
    assert done.returncode == 2, done.stderr
    assert "set data.max_len=8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
