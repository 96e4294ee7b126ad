"""Does data ever keep training waiting, and what does Ray cost?

    python -m benchmarks.data_path

(a) The stream alone: users a second with nobody training, through Ray Data and without it.
(b) Share of the time that workers wait for a batch, with 1 and 2 workers (goal: at most 5 %).
(c) `jobs/train_mclrec.py` with 1 worker against a bare loop over the same batches in one process,
    after the first 50 steps (goal: at most 5 % slower).
(d) 2 workers against 1, one thread each (goal: at least 1.7 times): with the users of a step shared
    between them, and with as many users each as the one has.

Each training is a process of its own, one after the other; bare loops come before and after Ray's.
Steps that saved a checkpoint count, in Ray's disfavor. Nothing is ranked until training has ended.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import torch

from benchmarks.record import Record, Table, arguments
from benchmarks.store import training_store
from distrl.cluster import connect
from distrl.config import RunConfig, load_config
from distrl.contract import Catalog
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash, read_manifest
from distrl.data.stream import batches, local_batches, training_dataset
from distrl.engine.collectives import ensure_process_group
from distrl.engine.zero import Engines
from distrl.methods import build
from distrl.tracking.config import resolve_tracking_uri
from distrl.tracking.curves import curves
from distrl.train.loop import Curves, Wishes, steps

CONFIG = "configs/mclrec/beauty.yaml"
SKIPPED_STEPS = 50
STREAM_EPOCHS = 20
STARTS = 3
"""Tries to start Ray, which gives itself 30 s: too few beside much other work."""
RAY_NICENESS = 15
"""Ray's default for its workers (RAY_worker_niceness)."""
GOALS = {"wait": 0.05, "slower": 0.05, "two_workers": 1.7}


def settings(store: str, epochs: int, workers: int) -> list[str]:
    """Overrides of CONFIG that all trainings here have in common."""
    return [
        f"data.store_uri={store}",
        "method.products=bf16",
        f"workers.num_workers={workers}",
        "workers.threads=1",
        f"training.epochs={epochs}",
        "training.validate_every_epochs=1000",
        "training.log_every_steps=5",
        "evaluation.num_workers=0",
    ]


def stream_alone(run: RunConfig, epochs: int, *, through_ray: bool) -> float:
    """Users a second, counted from the first batch on."""
    manifest = read_manifest(run.data.store_uri)
    maker = BatchMaker(run.data, 2, manifest.num_items, run.seed)
    ledger = Ledger(manifest_hash(manifest))
    if through_ray:
        connect(2)
        dataset = training_dataset(manifest, run.data, seed=run.seed, epochs=epochs, ledger=ledger)
        (shard,) = dataset.streaming_split(1, equal=False)
        stream = batches(shard, run.data, maker, batch_size=run.data.batch_size)
    else:
        stream = local_batches(manifest, run.data, maker, epochs=epochs, ledger=ledger)
    next(stream)
    start = time.perf_counter()
    users = sum(len(consumed.serial) for _, consumed in stream)
    took_s = time.perf_counter() - start
    ray.shutdown()  # an idle cluster beside the trainings would still take its share
    return users / took_s


def bare_loop(run: RunConfig) -> float:
    """Targets a second after the first steps: the worker's loop in this process, without Ray."""
    torch.set_num_threads(run.workers.threads)
    ensure_process_group("gloo")
    manifest = read_manifest(run.data.store_uri)
    torch.manual_seed(run.seed)
    method = build(run.method, Catalog(manifest.num_items, run.data.max_len)).train()
    engines = Engines(
        method,
        run.engine,
        device=torch.device("cpu"),
        micro_batch_size=run.data.batch_size,
        num_workers=1,
    )
    maker = BatchMaker.of(run.data, method, manifest.num_items, run.seed)
    ledger = Ledger(manifest_hash(manifest))
    epochs = run.training.epochs
    stream = local_batches(manifest, run.data, maker, epochs=epochs, ledger=ledger)
    first, _ = next(stream)
    start, targets = 0.0, 0
    for done in steps(
        method,
        engines,
        stream,
        empty=first,  # one rank alone never runs out while others go on
        already_consumed=0,
        curves=Curves(),
        seed=run.seed,
        first_step=0,
        rows_per_epoch=manifest.num_trainable_rows,
        wishes=Wishes(),
    ):
        if done.step == SKIPPED_STEPS:
            start, targets = time.perf_counter(), 0
        targets += done.targets if done.step > SKIPPED_STEPS else 0
    return targets / (time.perf_counter() - start)


def after_the_start(
    rates: Sequence[tuple[int, float]], waits: Sequence[tuple[int, float]], targets_per_step: float
) -> dict[str, float]:
    """Targets a second and share of waiting after the first steps, from a run's curves.

    Each point is of the stretch since the one before, whose seconds are its targets over its rate.
    """
    targets = seconds = waited_s = 0.0
    before = 0
    for (step, rate), (_, share) in zip(rates, waits, strict=True):
        if before >= SKIPPED_STEPS:
            stretch = (step - before) * targets_per_step
            targets += stretch
            seconds += stretch / rate
            waited_s += share * stretch / rate
        before = step
    return {"targets_per_s": targets / seconds, "wait_share": waited_s / seconds}


def under_ray(overrides: list[str], folder: Path, name: str) -> dict[str, float]:
    """One run of the job, as a user starts it: targets/s after the start, and share of waiting."""
    own = [f"name={name}", f"storage_uri={folder}", f"registered_model={name}"]
    command = [sys.executable, "jobs/train_mclrec.py", CONFIG, *overrides, *own]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = str(folder)
    done = _ran(command, environment)
    for _ in range(STARTS - 1):
        if "timed out during startup" in done.stderr:
            done = _ran(command, environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    result = json.loads((folder / name / "result.json").read_text())
    run = load_config(RunConfig, Path(CONFIG), [*overrides, *own])
    tracking = resolve_tracking_uri(run.tracking, run.storage_uri)
    found = curves(tracking, result["run_id"])
    manifest = read_manifest(run.data.store_uri)
    per_step = manifest.num_prefixes / manifest.num_trainable_rows * run.data.batch_size
    return after_the_start(found["system/targets_per_s"], found["system/wait_share"], per_step)


def _ran(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def bare_elsewhere(overrides: list[str]) -> float:
    """The bare loop in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_path", "--bare", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def compare(record: Record, store: str, epochs: int) -> None:
    """All of the trainings, in an order that is fair to both sides."""
    one, two = settings(store, epochs, 1), settings(store, epochs, 2)
    users = load_config(RunConfig, Path(CONFIG), one).data.batch_size
    # Ray's sockets live below this folder, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:
        folder = Path(temporary)
        before = bare_elsewhere(one)
        single = under_ray(one, folder, "one")
        after = bare_elsewhere(one)
        double = under_ray(two, folder, "two")
        as_many_each = under_ray([*two, f"data.batch_size={2 * users}"], folder, "twice")
    bare = (before + after) / 2
    slower = 1 - single["targets_per_s"] / bare
    gain = double["targets_per_s"] / single["targets_per_s"]
    gain_each = as_many_each["targets_per_s"] / single["targets_per_s"]
    record.figures |= {
        "bare_targets_per_s": [before, after],
        "one_worker": single,
        "two_workers": double,
        "two_workers_as_many_users_each": as_many_each,
        "slower_under_ray": slower,
        "two_workers_gain": gain,
        "two_workers_gain_as_many_users_each": gain_each,
    }
    rows = [
        ("bare loop, before and after", f"{before:,.0f} {after:,.0f}", "", ""),
        (f"Ray, 1 worker, {users} users a step", single["targets_per_s"],
         f"{single['wait_share']:.1%}",
         f"{slower:+.1%} slower than bare (goal {GOALS['slower']:.0%})"),
        (f"Ray, 2 workers, {users // 2} users each", double["targets_per_s"],
         f"{double['wait_share']:.1%}", f"{gain:.2f} times 1 worker (goal {GOALS['two_workers']})"),
        (f"Ray, 2 workers, {users} users each", as_many_each["targets_per_s"],
         f"{as_many_each['wait_share']:.1%}",
         f"{gain_each:.2f} times 1 worker (goal {GOALS['two_workers']})"),
    ]  # fmt: skip
    header = ("MCLRec, one thread each", "targets/s", "waiting (goal 5 %)", "ratio")
    record.table(Table(f"Training, steps after the first {SKIPPED_STEPS}", header, rows))


def bare_command(overrides: list[str]) -> None:
    """Entry of the child process."""
    # As Ray starts its own workers: on a busy machine it would otherwise get more of the cores.
    os.nice(RAY_NICENESS)
    print(bare_loop(load_config(RunConfig, Path(CONFIG), overrides)))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--stream-only", action="store_true", help="part (a) alone")
    return parser.parse_args()


def main() -> int:
    """Measures, prints, writes."""
    if sys.argv[1:2] == ["--bare"]:
        bare_command(sys.argv[2:])
        return 0
    args = parsed()
    record = Record("data_path", args)
    store, note = training_store()
    record.note(note)
    run = load_config(RunConfig, Path(CONFIG), settings(store, 1, 1))
    epochs = 3 if args.quick else STREAM_EPOCHS
    rows = []
    for label, through_ray in (("without Ray", False), ("through Ray Data", True)):
        rate = stream_alone(run, epochs, through_ray=through_ray)
        record.figures[f"stream_users_per_s, {label}"] = rate
        rows.append((label, rate))
    record.table(Table("The stream alone, 256 users and two views a batch", ("", "users/s"), rows))
    if not args.stream_only:
        compare(record, store, 1 if args.quick else 3)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
