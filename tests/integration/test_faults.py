"""Faults while training: a worker killed, the driver killed, a loss that is not finite."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrl.config import RunConfig
from distrl.data.plan import Ledger
from distrl.data.store import manifest_hash, read_manifest
from distrl.train.local import train_locally
from distrl.train.monitor import SELECT_BY
from jobs.local_head import RAY, ray_head
from tests.integration.s3_server import S3Server, start_s3
from tests.integration.servers import (
    REPOSITORY,
    elsewhere,
    job_process,
    kill_with_children,
    run_job,
    small_run,
    write_config,
    write_events,
)
from tests.store_factory import make_store

pytestmark = pytest.mark.slow

EPOCHS, SHARDS = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of four shards in which the next item mostly follows from the last."""
    folder = tmp_path_factory.mktemp("faults")
    write_events(folder / "events.csv", users=4000, items=60)
    rows = [line.split(",") for line in (folder / "events.csv").read_text().split()[1:]]
    sequences: dict[str, list[tuple[int, int]]] = {}
    for user, item, timestamp in rows:
        sequences.setdefault(user, []).append((int(timestamp), int(item[1:]) + 1))
    make_store(
        folder / "store",
        [[item for _, item in sorted(s)] for s in sequences.values()],
        num_shards=SHARDS,
    )
    return folder


def settings(folder: Path, name: str, seed: int = 0) -> dict:
    run = small_run(name, str(folder / "store"), str(folder / "runs"), "")
    run["tracking"] = {}
    run["evaluation"] = {"num_workers": 0, "cpus_per_worker": 0.5}
    run["seed"] = seed
    run["training"] |= {"epochs": EPOCHS, "checkpoint_every_steps": 15, "patience": None}
    return run


@contextmanager
def started(folder: Path, run: dict) -> Iterator[subprocess.Popen]:
    with (
        (folder / f"{run['name']}.log").open("a") as log,
        job_process("jobs/train_mclrec.py", write_config(run), stdout=log) as process,
    ):
        yield process


def training_workers(driver: int) -> list[psutil.Process]:
    """Processes of Ray Train's workers among what the driver started."""
    return actors_named("RayTrainWorker", driver)


def actors_named(name: str, driver: int) -> list[psutil.Process]:
    """Processes of Ray's actors whose name has this in it, among what the driver started."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(holds: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert process.poll() is None, f"training ended too early: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"it does not come to hold: {log.read_text()[-3000:]}"
        time.sleep(0.05)


def until_checkpoints(run_folder: Path, count: int, process: subprocess.Popen, log: Path) -> None:
    def holds() -> bool:
        return len(list(run_folder.glob("checkpoint-*/progress.json"))) >= count

    until(holds, process, log)


def assert_every_row_once(folder: Path, name: str) -> None:
    """The last checkpoint's ledger holds each sample of each epoch exactly once."""
    manifest = read_manifest(str(folder / "store"))
    run_folder = folder / "runs" / name
    snapshot = json.loads((run_folder / "checkpoint_manager_snapshot.json").read_text())
    last = run_folder / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    ledger = Ledger.from_json((last / "ledger.json").read_text(), manifest_hash(manifest))
    assert ledger.total == EPOCHS * manifest.num_trainable_rows
    for epoch in range(EPOCHS):
        for number, shard in enumerate(manifest.sequences):
            assert ledger.consumed_count(epoch, number) == shard.trainable_rows


def runs_named(folder: Path, name: str) -> list[tuple[str, str]]:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        return database.execute(
            "select run_uuid, status from runs where name = ?", (name,)
        ).fetchall()


def curve(folder: Path, run_id: str, key: str) -> list[int]:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        rows = database.execute(
            "select step from metrics where run_uuid = ? and key = ? order by step", (run_id, key)
        ).fetchall()
    return [step for (step,) in rows]


def undisturbed(folder: Path) -> list[float]:
    """Validation NDCG@10 of three seeds at their end, left alone: one process with all users."""
    scores = []
    for seed in range(3):
        run = RunConfig.model_validate(settings(folder, f"undisturbed-{seed}", seed))
        *_, last = train_locally(run, str(folder / run.name))
        assert last.epoch == EPOCHS
        scores.append(last.score)
    return scores


def test_a_killed_worker_and_a_killed_monitor_cost_no_row_and_double_none(folder):
    run = settings(folder, "killed-worker")
    log = folder / "killed-worker.log"
    with started(folder, run) as process:
        until_checkpoints(folder / "runs" / "killed-worker", 1, process, log)
        (monitor,) = actors_named("ray::Monitor", process.pid)
        os.kill(monitor.pid, signal.SIGKILL)
        until_checkpoints(folder / "runs" / "killed-worker", 2, process, log)
        workers = training_workers(process.pid)
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]

    assert_every_row_once(folder, "killed-worker")
    ((run_id, status),) = runs_named(folder, "killed-worker")
    assert status == "FINISHED"
    steps = curve(folder, run_id, "encoder/next_item")
    assert steps, "no curve"
    assert steps == sorted(set(steps)), "a point of the curve is there twice"
    validated = json.loads((folder / "runs" / "killed-worker" / "validations.json").read_text())
    assert len(validated) >= EPOCHS, "what was validated before the monitor died is lost"
    score, others = validated[max(validated, key=int)][SELECT_BY], elsewhere(undisturbed, folder)
    spread = max(others) - min(others)
    assert abs(score - sum(others) / 3) <= max(2 * spread, 0.02), (score, others)


def test_a_killed_driver_goes_on_with_resume_and_another_number_of_workers(folder):
    run = settings(folder, "killed-driver")
    log = folder / "killed-driver.log"
    with started(folder, run) as process:
        until_checkpoints(folder / "runs" / "killed-driver", 1, process, log)
        kill_with_children(process)

    refused = run_job("jobs/train_mclrec.py", write_config(run))
    assert refused.returncode == 2
    assert "--resume" in refused.stderr

    other = run_job("jobs/train_mclrec.py", write_config(run), "engine.lr=0.01", "--resume")
    assert other.returncode == 2
    assert "engine.lr" in other.stderr

    done = run_job("jobs/train_mclrec.py", write_config(run), "workers.num_workers=1", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_every_row_once(folder, "killed-driver")
    ((_, status),) = runs_named(folder, "killed-driver")
    assert status == "FINISHED"


@pytest.mark.parametrize(
    ("asked", "said", "status"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_job_that_is_asked_to_end_does_so_in_good_order(folder, asked, said, status):
    run = settings(folder, said)
    log = folder / f"{said}.log"
    with started(folder, run) as process:
        until_checkpoints(folder / "runs" / said, 1, process, log)
        workers = training_workers(process.pid)
        assert len(workers) == 2
        process.send_signal(asked)
        assert process.wait(timeout=120) == status, log.read_text()[-3000:]
    assert log.read_text().splitlines()[-1] == said
    assert "Traceback" not in log.read_text()
    assert "***" not in log.read_text()
    ((_, told),) = runs_named(folder, said)
    assert told == "KILLED"
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)


def test_a_job_that_ray_is_told_to_stop_does_so_in_good_order_and_goes_on_with_resume(folder):
    run = settings(folder, "stopped")
    job, log = ["jobs/train_mclrec.py", write_config(run)], folder / "stopped.log"
    with ray_head(4, folder / "head.log") as (address, environment):
        environment |= {"RAY_API_SERVER_ADDRESS": address}

        def ray_job(*arguments: str, **options: Any) -> subprocess.Popen:
            command = [RAY, "job", *arguments]
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **options)

        submit = ["submit", "--submission-id", "stopped", "--", sys.executable, *job]
        with log.open("w") as out:
            process = ray_job(*submit, stdout=out, stderr=subprocess.STDOUT)
        until_checkpoints(folder / "runs" / "stopped", 1, process, log)
        assert ray_job("stop", "stopped", stdout=subprocess.DEVNULL).wait(timeout=120) == 0
        process.wait(timeout=120)
        assert "terminated" in log.read_text().splitlines()
        assert "Traceback" not in log.read_text()
        ((_, told),) = runs_named(folder, "stopped")
        assert told == "KILLED"
    done = run_job(*job, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_every_row_once(folder, "stopped")


def test_a_shard_that_changed_in_place_ends_the_run_in_one_line(folder):
    run = settings(folder, "torn")
    run["data"]["store_uri"] = str(folder / "torn-store")
    shutil.copytree(folder / "store", folder / "torn-store")
    shard = folder / "torn-store" / "sequences" / "part-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    done = run_job("jobs/train_mclrec.py", write_config(run))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "part-00002.parquet" in line
    assert "sha256" in line
    assert "Traceback" not in done.stderr
    assert not (folder / "runs" / "torn" / "result.json").exists()


SNAPSHOT = "cut/checkpoint_manager_snapshot.json"


def copied(server: S3Server, bucket: str, target: Path) -> None:
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", []):
            if found["Key"].endswith("/") or not found["Size"]:
                continue  # what stands for a folder
            path = target / found["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, found["Key"], str(path))


def test_storage_that_is_away_for_a_while_costs_no_row(folder, tmp_path):
    log = folder / "cut.log"
    with start_s3(tmp_path / "s3") as s3:
        bucket = s3.create_bucket("cut")
        for path in filter(Path.is_file, (folder / "store").rglob("*")):
            s3.client().upload_file(str(path), "cut", f"store/{path.relative_to(folder / 'store')}")
        run = settings(folder, "cut") | {"storage_uri": bucket}
        run["data"]["store_uri"] = f"{bucket}/store"
        run["training"] |= {"checkpoint_every_steps": None, "checkpoint_every_minutes": 0.02}
        run["tracking"] = {"uri": f"sqlite:///{folder}/runs/mlflow.db"}
        job = ("jobs/train_mclrec.py", write_config(run))

        def has_checkpoint() -> bool:
            client = s3.client()
            if not client.list_objects_v2(Bucket="cut", Prefix=SNAPSHOT).get("Contents"):
                return False
            content = client.get_object(Bucket="cut", Key=SNAPSHOT)["Body"].read()
            return b"checkpoint-0" in content

        with (
            log.open("w") as out,
            job_process(*job, environment=s3.environment(), stdout=out) as process,
        ):
            until(has_checkpoint, process, log)
            s3.kill()
            until(
                lambda: "training stopped, as s3://cut/cut failed it" in log.read_text(),
                process,
                log,
            )
            s3.start_again(tmp_path / "s3" / "weed.log")
            assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
        copied(s3, "cut", folder / "runs")
    assert_every_row_once(folder, "cut")
    ((run_id, status),) = runs_named(folder, "cut")
    assert status == "FINISHED"
    steps = curve(folder, run_id, "encoder/next_item")
    assert steps == sorted(set(steps)), "a point of the curve is there twice"
    # Views are measured at each checkpoint, and time makes more of them than epochs do.
    assert len(curve(folder, run_id, "views/data/alignment")) > EPOCHS
    # From the same weights the same steps would have the same loss.
    reports = re.findall(r"step \d+  loss \S+", log.read_text())
    assert len(set(reports)) == len(reports), "it began again, and not at a checkpoint"
    assert re.search(r"epoch 0\.\d+/3 .*training stopped.*epoch [12]\.", log.read_text(), re.DOTALL)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_phase_step_and_terms(folder):
    run = settings(folder, "diverged")
    run["engine"] = {"lr": 1e30, "optimizer": "sgd"}
    done = run_job("jobs/train_mclrec.py", write_config(run))
    assert done.returncode == 2, done.stdout + done.stderr
    for said in ("phase ", "step 0", "not finite", "model_contrast=nan"):
        assert said in done.stderr
    ((_, status),) = runs_named(folder, "diverged")
    assert status == "FAILED"
    assert not (folder / "runs" / "diverged" / "result.json").exists()
