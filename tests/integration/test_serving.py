"""The registered model where nothing of distrl is installed, and over HTTP."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from distrl.serving.recommender import Recommender
from distrl.tracking.registry import CHAMPION, Registry
from tests.integration.models import random_model, registered
from tests.integration.servers import free_port, job_environment, until_healthy

NUM_USERS, NUM_ITEMS = 100, 60

LOAD_ELSEWHERE = """
import importlib.abc, json, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "deepspeed", "boto3", "s3fs", "daft"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Missing())
import mlflow, pandas

uri, histories, params = json.load(sys.stdin)
model = mlflow.pyfunc.load_model(uri)
answer = model.predict(pandas.DataFrame({"history": histories}), params=params)
import distrl
json.dump({"answer": answer.to_dict("list"), "code": distrl.__file__}, sys.stdout)
"""


@pytest.fixture(scope="module", params=["string", "int64"])
def champion(request, tmp_path_factory):
    """A registered champion; its histories with some unknown items, and what it must answer."""
    folder = tmp_path_factory.mktemp("serving")
    own = [f"item {n:03d}" if request.param == "string" else 9_000_000_000 + n for n in range(70)]
    rng = np.random.default_rng(3)
    artifact = random_model([own[n] for n in rng.permutation(NUM_ITEMS)])
    uri = f"sqlite:///{folder}/mlflow.db"
    version = registered(uri, f"{folder}/artifacts", "served", artifact, folder / "model")
    Registry(uri).move_aliases("served", expected={}, wanted={CHAMPION: version.number})
    histories = [
        [own[n] for n in rng.integers(len(own), size=length)]
        for length in [0, *rng.integers(1, 25, NUM_USERS - 1)]
    ]
    asked = pa.array(histories, type=pa.list_(artifact.items.type))
    expected = Recommender(artifact).recommend(asked, 10, mask_seen=True)
    return folder, uri, histories, expected


def check(answer, expected):
    """The same items in the same order, and scores that survived JSON."""
    assert answer["items"] == expected.items.to_pylist()
    assert answer["num_unknown"] == expected.num_unknown.tolist()
    for scores, wanted in zip(answer["scores"], expected.scores.to_pylist(), strict=True):
        assert scores == pytest.approx(wanted, rel=1e-12)


def test_the_champion_answers_alike_where_only_its_requirements_are_installed(champion, tmp_path):
    _, uri, histories, expected = champion
    request = json.dumps(["models:/served@champion", histories, {"k": 10, "mask_seen": True}])
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE],
        input=request,
        cwd=tmp_path,
        env=job_environment({"MLFLOW_TRACKING_URI": uri}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    # The code that travelled with the model, not the checkout that this interpreter knows.
    assert "/artifacts/" in said["code"]
    check(said["answer"], expected)


def test_nothing_that_others_load_is_a_pickle(champion):
    folder = champion[0]
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".db"]
    names = {path.name for path in files}
    assert {"model.safetensors", "method.json", "items.parquet", "MLmodel"} <= names
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin", ".zip"), (
            path
        )
        start = path.read_bytes()[:4]
        assert start[:1] != b"\x80" or path.suffix == ".safetensors", f"{path} begins as a pickle"
        assert start != b"PK\x03\x04", f"{path} is a zip, as torch.save writes"


@contextmanager
def served(uri, folder):
    """`mlflow models serve` on loopback, ended by pid."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion",
        "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            # `mlflow models serve` starts uvicorn by name.
            env=job_environment(
                {
                    "MLFLOW_TRACKING_URI": uri,
                    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
                }
            ),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        until_healthy(port, process, log)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


def post(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["predictions"]


@pytest.mark.slow
def test_mlflow_models_serve_answers_over_http(champion):
    folder, uri, histories, expected = champion
    with served(uri, folder) as url:
        rows = [{"history": history} for history in histories]
        answer = post(url, {"dataframe_records": rows, "params": {"k": 10, "mask_seen": True}})
        check({name: [row[name] for row in answer] for name in answer[0]}, expected)
        (by_default,) = post(url, {"dataframe_records": rows[1:2]})
        assert len(by_default["items"]) == 10
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, {"dataframe_records": [{"history": "no list"}]})
        assert error.value.code == 400
