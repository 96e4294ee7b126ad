"""Runs the benchmarks, one process each, and puts what they found onto one page.

    python -m benchmarks                            # all of them, some 20 minutes on two cores
    python -m benchmarks training_step evaluation   # some of them; the others' results stay
    python -m benchmarks --quick                    # do they work at all?
    python -m benchmarks --full                     # with 20 M events in prepare_engines

What a script lacks (a GPU, java, a package) is named and the rest goes on. The status is 1 only
where a script failed. Each script is a command of its own, `python -m benchmarks.NAME --help`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import arguments

SCRIPTS = (
    "training_step",
    "gpu_step",
    "data_path",
    "evaluation",
    "retrieve",
    "authors_recipe",
    "prepare_engines",
    "embed",
    "semantic_step",
    "laclrec_step",
    "worker_memory",
)
PAGE = "latest.md"


def run(script: str, options: list[str]) -> tuple[int, float]:
    """Exit status and seconds of one script."""
    print(f"\n=== {script}", flush=True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *options], check=False)
    return done.returncode, time.monotonic() - start


def page(folder: Path) -> str:
    """All results in a folder, as Markdown."""
    parts = ["# The latest results of `make bench`", "Written by `python -m benchmarks`."]
    for script in SCRIPTS:
        path = folder / f"{script}.json"
        parts.append(section(json.loads(path.read_text())) if path.exists() else missing(script))
    return "\n\n".join(parts) + "\n"


def section(found: dict) -> str:
    """One script's result, with what it ran on."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    ran_on = (
        f"`{found['command']}`, {found['started']} to {found['ended']}, commit {found['commit']}"
        f"{', QUICK: small sizes' if found['quick'] else ''}. {machine['cores']} cores "
        f"({machine['cpu']}), {machine['memory_gib']} GiB, load {machine['load_1min']} before and "
        f"{found['load_1min_at_end']} after. {versions}."
    )
    return "\n\n".join([f"## {found['script']}", ran_on, *found["tables"], *found["notes"]])


def missing(script: str) -> str:
    """The section of a script that has no result."""
    return f"## {script}\n\nNot measured on this machine."


def main() -> int:
    """Runs what was asked for; 1 if any of it failed."""
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="20 M events in prepare_engines")
    # No `choices`: argparse would refuse the empty list that stands for all.
    parser.add_argument("scripts", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    args = parser.parse_args()
    unknown = sorted(set(args.scripts) - set(SCRIPTS))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    options = ["--results", str(args.results), *(["--quick"] if args.quick else [])]
    failed = []
    for script in args.scripts or SCRIPTS:
        more = ["--full"] if args.full and script == "prepare_engines" else []
        status, took_s = run(script, [*options, *more])
        print(f"=== {script}: {took_s:.0f} s, status {status}", flush=True)
        failed += [script] if status else []
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / PAGE).write_text(page(args.results))
    print(f"written: {args.results / PAGE}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
