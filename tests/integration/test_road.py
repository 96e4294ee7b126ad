"""The whole road with every URI on S3, on a cluster of two nodes: raw log to promoted model."""

import json
import secrets
from itertools import product

import pytest

from distrl.tracking.curves import curves
from tests.integration.s3_server import start_s3
from tests.integration.servers import (
    job_process,
    mlflow_server,
    ray_cluster,
    run_job,
    small_run,
    write_config,
    write_events,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """S3 with a raw log in it, a cluster and an MLflow server that know the way to S3."""
    folder = tmp_path_factory.mktemp("road")
    with start_s3(folder / "s3") as s3:
        bucket = s3.create_bucket("road")
        log = folder / "events.csv"
        write_events(log, users=600, items=50)
        s3.client().upload_file(str(log), "road", "raw/events.csv")
        with (
            mlflow_server(folder / "mlflow", s3.environment(), f"{bucket}/mlflow") as tracking_uri,
            ray_cluster(s3.environment()) as cluster,
        ):
            yield {
                "s3": s3,
                "bucket": bucket,
                "tracking_uri": tracking_uri,
                "cluster": cluster,
                "environment": {**s3.environment(), "RAY_ADDRESS": cluster.address},
            }


def run_settings(place, name):
    bucket = place["bucket"]
    return small_run(name, f"{bucket}/store", f"{bucket}/runs", place["tracking_uri"])


def test_raw_log_to_promoted_model_with_every_uri_on_s3(place):
    bucket, environment = place["bucket"], place["environment"]
    prepare = write_config(
        {
            "store_uri": f"{bucket}/store",
            "source": {"uri": f"{bucket}/raw/events.csv"},
            "num_shards": 4,
        }
    )
    done = run_job("jobs/prepare.py", prepare, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "600" in done.stdout

    train = write_config(run_settings(place, "first"))
    done = run_job("jobs/train_mclrec.py", train, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("waiting for data", "ETA", "loss", "rows/s", "popularity", "repeat"):
        assert said in done.stdout, f"{said!r} is missing in: {done.stdout}"
    result = json.loads(
        place["s3"].client().get_object(Bucket="road", Key="runs/first/result.json")["Body"].read()
    )
    # Items follow one another four times in five: a model that learns anything finds the next.
    assert result["metrics"]["kept/hr_at_10"] > 0.4
    measured = curves(place["tracking_uri"], result["run_id"])
    for kind, name in product(("data", "learned"), ("alignment", "uniformity", "effective_rank")):
        assert len(measured[f"views/{kind}/{name}"]) == 3  # one an epoch

    evaluate = write_config(
        {
            "model_uri": "models:/road/1",
            "store_uri": f"{bucket}/store",
            "output_uri": f"{bucket}/evaluation",
            "tracking": {"uri": place["tracking_uri"]},
        }
    )
    done = run_job("jobs/evaluate.py", evaluate, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{result['metrics']['kept/ndcg_at_10']:.4f}" in done.stdout

    promote = write_config(
        {
            "model": "road",
            "store_uri": f"{bucket}/store",
            "tracking": {"uri": place["tracking_uri"]},
        }
    )
    done = run_job("jobs/promote.py", promote, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_job(
        "jobs/evaluate.py", evaluate, "model_uri=models:/road@champion", environment=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_secret_is_one_clear_error_before_any_worker_starts(place):
    wrong = secrets.token_hex(20)
    environment = {**place["environment"], "AWS_SECRET_ACCESS_KEY": wrong}
    settings = write_config(run_settings(place, "wrong-secret"))
    done = run_job("jobs/train_mclrec.py", settings, environment=environment, timeout_s=180)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "permission denied" in done.stderr
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert "Traceback" not in done.stderr
    assert wrong not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("workers.num_workers=64", "data.batch_size=128"), "the cluster has 8 CPU"),
        (("workers.use_gpu=true",), "the cluster has 0 GPU"),
    ],
)
def test_a_cluster_that_can_never_hold_the_workers_is_told(place, overrides, said):
    settings = write_config(run_settings(place, "too-large"))
    environment = place["environment"]
    done = run_job(
        "jobs/train_mclrec.py", settings, *overrides, environment=environment, timeout_s=180
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "workers.num_workers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_grows_is_waited_for_with_a_word_and_then_trains(place):
    environment = {**place["environment"], "DISTRL_CLUSTER_GROWS": "1"}
    settings = write_config(run_settings(place, "grown"))
    late = ("workers.resources_per_worker={late: 1}", "workers.start_timeout_s=15")
    command = ["jobs/train_mclrec.py", settings, *late, "training.epochs=1"]
    said = ""
    with job_process(*command, environment=environment) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "no report yet" in line and "no report yet" not in said:
                # By now Ray has given up placing the workers once, and asked anew.
                place["cluster"].add_node(num_cpus=2, resources={"late": 2})
            said += line
        assert job.wait(timeout=60) == 0, said
    assert "the cluster has 0 late, this job needs 2 at once" in said
    assert "take their first steps, or wait for the cluster to hold them" in said
    assert "validated epoch 1" in said


def test_a_used_name_is_refused_and_nothing_of_the_run_changes(place):
    settings = write_config(run_settings(place, "first"))
    done = run_job(
        "jobs/train_mclrec.py", settings, environment=place["environment"], timeout_s=180
    )
    assert done.returncode == 2
    assert "--resume" in done.stderr
