"""What a benchmark leaves behind: tables on the screen, and JSON that says on what it ran."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "pyarrow", "numpy", "daft", "pyspark", "polars")


@dataclass(frozen=True)
class Table:
    """One table of a result."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        """As Markdown."""
        cells = [[_cell(value) for value in row] for row in (self.header, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        rule = f"|{'---|' * len(self.header)}"
        return "\n".join([f"{self.title}", "", lines[0], rule, *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser that every script starts from."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work at all?")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for JSON and pictures"
    )
    return parser


def machine() -> dict[str, Any]:
    """What this runs on, and how busy it was over the last minute."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of Python and of every package that a figure here depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Record:
    """Collects a script's result; it notes the machine when it starts and when it ends."""

    def __init__(self, script: str, args: argparse.Namespace) -> None:
        self.script, self.folder = script, args.results
        self.tables: list[Table] = []
        self.notes: list[str] = []
        self.figures: dict[str, Any] = {}
        self._start = {
            "started": _now(),
            "commit": _commit(),
            "quick": args.quick,
            "machine": machine(),
        }

    def table(self, table: Table) -> None:
        """Prints and keeps a table."""
        print(f"\n{table}\n", flush=True)
        self.tables.append(table)

    def note(self, line: str) -> None:
        """Prints and keeps a sentence about the result."""
        print(line, flush=True)
        self.notes.append(line)

    def write(self) -> Path:
        """Everything as JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.script}.json"
        content = {
            "script": self.script,
            "command": " ".join(["python -m", f"benchmarks.{self.script}", *_options()]),
            **self._start,
            "ended": _now(),
            "load_1min_at_end": round(os.getloadavg()[0], 2),
            "versions": versions(),
            "notes": self.notes,
            "figures": self.figures,
            "tables": [str(table) for table in self.tables],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {path}", flush=True)
        return path


def _options() -> list[str]:
    """What the script was called with, without the folder of results, which is of one machine."""
    given = sys.argv[1:]
    if "--results" in given:
        at = given.index("--results")
        del given[at : at + 2]
    return given


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
