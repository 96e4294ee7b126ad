"""Which engine should prepare raw events? PySpark, Polars, Ray Data, Daft, or plain Ray tasks.

    python -m benchmarks.prepare_engines                  # all engines, 5 M generated events
    python -m benchmarks.prepare_engines --full           # 20 M
    python -m benchmarks.prepare_engines --engines spark polars distrl --events 100000000

Each does the same: drop items, then users, with fewer than 5 interactions; number the items by
falling count; one time-ordered list a user; Parquet. No step brings events or the id map to the
driver, except in Polars, which holds everything in memory. `distrl` is `distrl.data.prepare`
itself, which besides checks every row, keeps input order between equal times, shuffles users by a
hash and writes checksums. Each engine has two CPUs and a process of its own; its start is not
counted. Memory is the peak proportional set size (PSS) of the whole tree of processes.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.prepare.events import NUM_CPUS, generate
from benchmarks.prepare.watch import Watch
from benchmarks.record import Record, Table, arguments

ENGINES = ("ray_data", "daft", "daft_flight", "spark", "polars", "distrl")
PACKAGE_OF = {"daft": "daft", "daft_flight": "daft", "spark": "pyspark", "polars": "polars"}
OBJECT_STORE_BYTES = 1_500_000_000
DEFAULT_EVENTS, FULL_EVENTS, QUICK_EVENTS = 5_000_000, 20_000_000, 200_000


@contextmanager
def engine(name: str) -> Iterator[Callable[[Path, Path], int]]:
    """The started engine: a function from the events and the target to the users kept."""
    with tempfile.TemporaryDirectory(prefix="engines-", dir="/tmp") as temporary:
        if name == "polars":
            from benchmarks.prepare.on_polars import with_polars

            yield with_polars
        elif name == "spark":
            from benchmarks.prepare.on_spark import session, with_spark

            spark = session(temporary)
            yield lambda folder, out: with_spark(spark, folder, out)
            spark.stop()
        else:
            yield from _on_ray(name, temporary)


def _on_ray(name: str, temporary: str) -> Iterator[Callable[[Path, Path], int]]:
    import ray

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=temporary,
    )
    if name == "ray_data":
        from benchmarks.prepare.on_ray_data import with_ray_data

        yield with_ray_data
    elif name == "distrl":
        from benchmarks.prepare.on_distrl import with_distrl

        yield with_distrl
    else:
        from benchmarks.prepare.on_daft import with_daft

        shuffle = "flight_shuffle" if name == "daft_flight" else None
        yield lambda folder, out: with_daft(folder, out, shuffle)
    ray.shutdown()


def measure(name: str, folder: Path, out: Path) -> dict[str, float]:
    """Runs one engine in this process and everything it starts."""
    watch = Watch()
    watch.start()
    with engine(name) as run:
        watch.look()
        before_s, start = sum(watch.cpu_s.values()), time.monotonic()
        users = run(folder, out)
        wall_s = time.monotonic() - start
        watch.look()
        return {
            "users": users,
            "wall_s": round(wall_s, 1),
            "cpu_s": round(sum(watch.cpu_s.values()) - before_s, 1),
            "peak_pss_gb": round(watch.peak_bytes / 1e9, 2),
        }


def missing(name: str) -> str | None:
    """What this machine lacks for an engine."""
    package = PACKAGE_OF.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install -c constraints.txt -e '.[bench]')"
    if name == "spark" and shutil.which("java") is None:
        return "there is no java on the PATH, which PySpark needs (17 or newer)"
    return None


def _in_own_process(name: str, folder: Path, out: Path) -> dict[str, float] | str:
    """What `measure` gives in a fresh process, or why there is nothing."""
    lack = missing(name)
    if lack is not None:
        return f"skipped, {lack}"
    command = [sys.executable, "-m", "benchmarks.prepare_engines", "--measure", name]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*command, str(folder), str(out)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        shutil.rmtree(out, ignore_errors=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        errors.seek(0)
        return f"failed: {(errors.read().strip() or 'no message').splitlines()[-1][:200]}"


def compare(args: argparse.Namespace, num_events: int, record: Record) -> bool:
    """All engines one after the other over the same events; whether none failed."""
    rows, failures = [], 0
    with tempfile.TemporaryDirectory(prefix="distrl-prepare-") as temporary:
        folder = Path(temporary, "events")
        generate(folder, num_events)
        for name in args.engines:
            print(f"== {num_events:,} events: {name}", flush=True)
            found = _in_own_process(name, folder, Path(temporary, name))
            record.figures[name] = found
            if isinstance(found, str):
                record.note(f"{name}: {found}")
                failures += found.startswith("failed")
                continue
            rate = num_events / found["wall_s"]
            rows.append((name, int(found["users"]), rate, *list(found.values())[1:]))
            print(rows[-1], flush=True)
    record.figures["events"] = num_events
    header = ("engine", "users kept", "events/s", "wall s", "CPU s", "peak GB")
    record.table(Table(f"Prepare, {num_events:,} events, {NUM_CPUS} CPUs", header, rows))
    return not failures


def main() -> int:
    """All engines, or the one that a parent process asks for."""
    if sys.argv[1:2] == ["--measure"]:
        name, folder, out = sys.argv[2:]
        print(json.dumps(measure(name, Path(folder), Path(out))), flush=True)
        return 0
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help=f"{FULL_EVENTS:,} events")
    parser.add_argument("--events", type=int, help="events to generate")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, metavar="NAME")
    args = parser.parse_args()
    by_flag = QUICK_EVENTS if args.quick else FULL_EVENTS if args.full else DEFAULT_EVENTS
    num_events = args.events or by_flag
    record = Record("prepare_engines", args)
    done = compare(args, num_events, record)
    record.write()
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
