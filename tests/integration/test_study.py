"""A real study with Ray Tune whose driver is killed midway."""

import csv
import json
import sqlite3
import time
from pathlib import Path

import pytest

from distrl.config import load_config
from distrl.errors import ConfigError
from distrl.study.config import StudyConfig
from distrl.study.judging import judge
from distrl.study.study import run_study
from distrl.study.table import rows
from distrl.study.trials import trial_folder, trials
from distrl.train.local import train_locally
from tests.integration.servers import elsewhere, job_process, kill_with_children, run_job
from tests.store_factory import make_store

pytestmark = pytest.mark.slow

EPOCHS = 8
SEQUENCES = [[1 + (u + i * (1 + u % 3)) % 40 for i in range(6 + u % 9)] for u in range(240)]


@pytest.fixture
def config(tmp_path) -> Path:
    """Two methods, one seed, one at a time, judged clean and under noise."""
    make_store(tmp_path / "store", SEQUENCES, num_items=40)
    small = {"hidden_size": 16, "inner_size": 32}
    base = {
        "name": "base",
        "data": {"store_uri": str(tmp_path / "store"), "batch_size": 32, "max_len": 12},
        "method": {"name": "mclrec", **small},
        "engine": {"lr": 0.003},
    }
    study = {
        "name": "killed",
        "base": str(tmp_path / "base.yaml"),
        "storage_uri": str(tmp_path / "studies"),
        "variants": {"control": [f"method={json.dumps({'name': 'sasrec', **small})}"], "full": []},
        "epochs": EPOCHS,
        "evaluations": {"clean": [], "noise": ["evaluation.noise_share=0.3"]},
        "cpus_per_trial": 0.5,
        "max_concurrent": 1,
    }
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    return tmp_path / "study.yaml"


def validations(folder: Path, trial: str) -> list[dict]:
    index = folder / "trials" / trial / "validations.json"
    return json.loads(index.read_text())["validations"] if index.exists() else []


def kill_midway(config: Path, folder: Path) -> None:
    """Starts the study and kills its driver once the second trial is on its way."""
    log = config.with_suffix(".log")
    with log.open("w") as out, job_process("jobs/study.py", str(config), stdout=out) as process:
        deadline = time.monotonic() + 200
        while not validations(folder, "001-seed0"):
            assert process.poll() is None, f"the study ended too early: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        kill_with_children(process)


def in_one_process(config: Path, folder: Path) -> list[dict[str, float]]:
    """Test metrics of the same trials without Ray, row by row of the table."""
    study = load_config(StudyConfig, config, [])
    found = trials(study)
    for trial in found:
        list(train_locally(trial.run, trial_folder(str(folder), trial.name)))
    judged = [judge(trial, str(folder)) for trial in found]
    return [dict(row.means) for row in rows(found, judged, by_length=False)]


def test_a_killed_study_goes_on_and_comes_to_what_one_process_comes_to(config, tmp_path):
    folder = tmp_path / "studies" / "killed"
    kill_midway(config, folder)
    finished = (folder / "trials" / "000-seed0" / "validations.json").read_bytes()
    begun = validations(folder, "001-seed0")
    assert len(json.loads(finished)["validations"]) == EPOCHS
    assert 0 < len(begun) < EPOCHS

    so_far = run_job("jobs/study.py", str(config), "--so-far")
    assert so_far.returncode == 0, so_far.stderr
    assert "| control | clean | 1 |" in so_far.stdout
    assert "| full |" not in so_far.stdout
    assert "1 of 2 trials are in it." in so_far.stdout
    judged = (folder / "evaluations" / "000-seed0.json").read_bytes()

    study = load_config(StudyConfig, config, [])
    with pytest.raises(ConfigError, match="--resume"):
        run_study(study, resume=False, say=print)
    with pytest.raises(ConfigError, match=r"epochs=3 \(was 8\)"):
        run_study(study.model_copy(update={"epochs": 3}), resume=True, say=print)

    done = run_job("jobs/study.py", str(config), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"001-seed0 (full)  epoch {EPOCHS}/{EPOCHS}" in done.stdout
    assert "000-seed0 (control)  epoch" not in done.stdout
    # Seconds are among a validation's figures, so a repetition would show.
    assert (folder / "trials" / "000-seed0" / "validations.json").read_bytes() == finished
    assert (folder / "evaluations" / "000-seed0.json").read_bytes() == judged
    assert validations(folder, "001-seed0")[: len(begun)] == begun
    assert len(validations(folder, "001-seed0")) == EPOCHS

    table = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["variant"], row["evaluation"]) for row in table] == [
        ("control", "clean"), ("control", "noise"), ("full", "clean"), ("full", "noise"),
    ]  # fmt: skip
    alone = elsewhere(in_one_process, config, tmp_path / "alone")
    for row, expected in zip(table, alone, strict=True):
        for name, value in expected.items():
            if name not in ("seconds", "targets_per_s"):
                assert float(row[f"{name}_mean"]) == value, name
    assert table[0]["kept/ndcg_at_10_mean"] != table[1]["kept/ndcg_at_10_mean"]
    assert_one_mlflow_run(tmp_path / "studies")


def assert_one_mlflow_run(studies: Path) -> None:
    with sqlite3.connect(studies / "mlflow.db") as database:
        ((run_id, status, artifacts),) = database.execute(
            "select r.run_uuid, r.status, r.artifact_uri from runs r join experiments e "
            "on r.experiment_id = e.experiment_id where e.name = 'killed'"
        ).fetchall()
        keys = database.execute("select key from metrics where run_uuid = ?", (run_id,)).fetchall()
    assert status == "FINISHED"
    assert ("full/noise/kept/ndcg_at_10",) in keys
    held = {path.name for path in Path(artifacts.removeprefix("file://")).iterdir()}
    assert {"table.csv", "table.md", "picture.png", "study.yaml"} <= held


def test_a_search_that_ends_trials_early_lets_a_stage_that_cannot_rank_pass(config, tmp_path):
    base = json.loads((tmp_path / "base.yaml").read_text())
    base["method"] |= {"name": "laclrec", "pretrain_epochs": 2}
    base["engine"] = {}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    study = json.loads(config.read_text())
    del study["variants"], study["evaluations"]
    study |= {
        "epochs": 4,
        "search": {"engine.lr": {"loguniform": [0.00001, 0.01]}},
        "num_samples": 2,
        "halving": {"grace_epochs": 1, "factor": 2},
    }
    config.write_text(json.dumps(study))
    done = run_job("jobs/study.py", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    table = csv.DictReader((tmp_path / "studies" / "killed" / "table.csv").open())
    assert len(list(table)) == 2
    waiting = [line for line in done.stdout.splitlines() if "not ranking yet" in line]
    assert {line.partition("  ")[2].partition("  ")[0] for line in waiting} == {
        "epoch 1/4", "epoch 2/4",
    }  # fmt: skip
    assert all("augmenter/total" in line for line in waiting)
    for trial in ("000-seed0", "001-seed0"):
        kept = validations(tmp_path / "studies" / "killed", trial)
        assert [bool(entry["metrics"]) for entry in kept[:3]] == [False, False, True]
