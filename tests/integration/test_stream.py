"""The stream under Ray Train: workers that die, workers that are fewer, shards that are torn."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.stream import StreamSplit, batches, local_batches, training_dataset
from distrl.errors import SchemaError, StorageError
from distrl.schema import Manifest
from tests.integration.servers import REPOSITORY
from tests.store_factory import make_store

pytestmark = pytest.mark.slow

EPOCHS, SHARDS, STORE = 3, 4, "hash"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # Not under pytest's own folder: paths of Unix sockets are short.
    folder = tempfile.mkdtemp(prefix="distrl-ray-")
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        logging_level="ERROR",
        _temp_dir=folder,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    # An odd number of users with targets: a split into equal halves would lose one of them.
    lengths = [*rng.integers(4, 30, 1401), *[3] * 40]
    sequences = [rng.integers(1, 200, n).tolist() for n in lengths]
    folder = tmp_path_factory.mktemp("stream") / "store"
    manifest = make_store(folder, sequences, num_shards=SHARDS, row_group_rows=100)
    return manifest, DataConfig(store_uri=str(folder), batch_size=32)


def views_by_place(batch, taken):
    """Both views of each sample of a batch, by its place in the plan."""
    found = {}
    views = [(v.segment.flatten(), v.items.flatten()) for v in batch.views]
    places = zip(taken.epoch.tolist(), taken.shard.tolist(), taken.serial.tolist(), strict=True)
    for row, place in enumerate(places):
        found["/".join(map(str, place))] = [
            items[segment == row].tolist() for segment, items in views
        ]
    return found


def committed_ledger(run: Path) -> Ledger:
    """The ledger of the checkpoint that Ray will hand to the workers."""
    snapshot = run / "checkpoint_manager_snapshot.json"
    if not snapshot.exists():
        return Ledger(STORE)
    name = json.loads(snapshot.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    return Ledger.from_json((run / name / "ledger.json").read_text(), STORE)


@dataclass(frozen=True)
class Stream:
    manifest: Manifest
    config: DataConfig
    run: Path

    def __call__(self):
        ledger = committed_ledger(self.run)
        return training_dataset(self.manifest, self.config, seed=0, epochs=EPOCHS, ledger=ledger)


def train(task):
    """Reads its share to the end in step with the other ranks; one may kill itself on the way."""
    stream, dies_at = task["stream"], task["dies_at"]
    config = stream.config
    ledger, mine = Ledger(STORE), Ledger(STORE)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            ledger = Ledger.from_json(Path(folder, "ledger.json").read_text(), STORE)
    ranks = dist.get_world_size()
    maker = BatchMaker(config, 2, stream.manifest.num_items, 0)
    part = ray.train.get_dataset_shard("train")
    reading = batches(part, config, maker, batch_size=config.batch_size // ranks)
    seen = (stream.run / f"views-{uuid.uuid4()}.jsonl").open("w")

    def report():
        merged = [None] * ranks
        dist.all_gather_object(merged, mine)
        for other in merged:
            ledger.merge(other)
        folder = tempfile.mkdtemp()
        if dist.get_rank() == 0:
            Path(folder, "ledger.json").write_text(ledger.to_json())
        ray.train.report({"rows": ledger.total}, checkpoint=Checkpoint.from_directory(folder))

    step = 0
    while True:
        batch, taken = next(reading, (None, None))
        flags = [None] * ranks
        dist.all_gather_object(flags, batch is not None)
        if not any(flags):
            break
        step += 1
        if batch is not None:
            mine.add(taken.epoch, taken.shard, taken.serial)
            seen.write(json.dumps(views_by_place(batch, taken)) + "\n")
            seen.flush()
        if step == dies_at and checkpoint is None and dist.get_rank() == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 15 == 0:
            report()
            mine = Ledger(STORE)
    report()


def fit(store, run, *, workers, dies_at=None, max_failures=1):
    run.mkdir(parents=True, exist_ok=True)
    manifest, config = store
    stream = Stream(manifest, config, run)
    return TorchTrainer(
        train,
        train_loop_config={"stream": stream, "dies_at": dies_at},
        datasets={"train": stream},
        dataset_config=StreamSplit(config.read_ahead_bytes),
        scaling_config=ScalingConfig(num_workers=workers),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            storage_path=str(run.parent),
            name=run.name,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    ).fit()


def assert_every_sample_once(store, run):
    ledger = committed_ledger(run)
    assert ledger.total == EPOCHS * store[0].num_trainable_rows
    for epoch in range(EPOCHS):
        for number, shard in enumerate(store[0].sequences):
            assert ledger.consumed(epoch, number) == [(0, shard.trainable_rows)]


def assert_views_are_those_of_one_process(store, run):
    """What all workers saw of all samples, replayed ones too, is what one process draws."""
    manifest, config = store
    maker = BatchMaker(config, 2, manifest.num_items, 0)
    expected = {}
    for batch, taken in local_batches(manifest, config, maker, epochs=EPOCHS, ledger=Ledger(STORE)):
        expected |= views_by_place(batch, taken)
    seen = set()
    for file in run.glob("views-*.jsonl"):
        # A worker that is killed may leave half a line.
        for line in file.read_text().split("\n")[:-1]:
            for place, views in json.loads(line).items():
                assert views == expected[place]
                seen.add(place)
    assert seen == set(expected)


def test_a_killed_worker_costs_no_sample_and_doubles_none(store, tmp_path):
    run = tmp_path / "killed"
    fit(store, run, workers=2, dies_at=50)
    assert_every_sample_once(store, run)
    assert_views_are_those_of_one_process(store, run)
    assert len(list(run.glob("views-*.jsonl"))) == 4, "no worker was started again"


def test_one_worker_serves_what_two_have_left(store, tmp_path):
    run = tmp_path / "fewer"
    with pytest.raises(ray.train.TrainingFailedError):
        fit(store, run, workers=2, dies_at=70, max_failures=0)
    before = committed_ledger(run).total
    assert 0 < before < EPOCHS * store[0].num_trainable_rows
    fit(store, run, workers=1)
    assert_every_sample_once(store, run)
    assert_views_are_those_of_one_process(store, run)


def parts_of(store, ranks=1, epochs=1, ledger=None):
    manifest, config = store
    ledger = ledger or Ledger(STORE)
    dataset = training_dataset(manifest, config, seed=0, epochs=epochs, ledger=ledger)
    shards = StreamSplit(config.read_ahead_bytes).configure({"train": dataset}, ranks, None, None)
    maker = BatchMaker(config, 0, manifest.num_items, 0)
    return [
        batches(shard["train"], config, maker, batch_size=config.batch_size) for shard in shards
    ]


def test_a_torn_shard_is_the_error_that_the_worker_sees(tmp_path):
    folder = tmp_path / "store"
    manifest = make_store(folder, [[1, 2, 3, 4, 5]] * 40, num_shards=2)
    torn = folder / manifest.sequences[1].path
    torn.write_bytes(torn.read_bytes()[:-7])
    (part,) = parts_of((manifest, DataConfig(store_uri=str(folder), batch_size=8)))
    with pytest.raises(SchemaError, match=manifest.sequences[1].path):
        list(part)


def test_a_finished_plan_serves_nothing(store):
    ledger = Ledger(STORE)
    for number, shard in enumerate(store[0].sequences):
        serials = np.arange(shard.trainable_rows)
        ledger.add(np.zeros_like(serials), np.full_like(serials, number), serials)
    (part,) = parts_of(store, ledger=ledger)
    assert list(part) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """40 MB in blocks of about 0.3 MB, of which 4 MB may lie ready."""
    folder = tmp_path_factory.mktemp("large") / "store"
    manifest = make_store(folder, [list(range(1, 2501))] * 4000, num_shards=4, row_group_rows=100)
    return manifest, DataConfig(store_uri=str(folder), batch_size=8, read_ahead_bytes=4 * 2**20)


def test_reading_does_not_run_ahead_without_bound(large, tmp_path):
    """Files that are not needed for long yet are not read yet: they can vanish unnoticed."""
    manifest, config = large
    folder = tmp_path / "store"
    shutil.copytree(config.store_uri, folder)
    config = config.model_copy(update={"store_uri": str(folder)})
    (part,) = parts_of((manifest, config))
    next(part)
    time.sleep(5)
    for shard in manifest.sequences:
        (folder / shard.path).unlink()
    with pytest.raises(StorageError, match="does not exist"):
        list(part)


def reading_processes():
    """Processes of this cluster that run a reading task."""
    session = ray.get_runtime_context().get_session_name()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ray::MapBatches" in "".join(process.cmdline()):
                raylet = process.parent()
                if raylet and any(session in argument for argument in raylet.cmdline()):
                    found.append(process)
    return found


def test_a_killed_reading_task_costs_no_sample_and_doubles_none(large):
    (part,) = parts_of(large)
    ledger = Ledger(STORE)
    for number, (_, taken) in enumerate(part):
        ledger.add(taken.epoch, taken.shard, taken.serial)
        if number == 20:
            killed = reading_processes()
            assert killed, "nothing reads"
            for process in killed:
                process.kill()
    assert ledger.total == large[0].num_trainable_rows
