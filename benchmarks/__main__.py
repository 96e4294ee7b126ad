"""Runs the benchmarks that need nothing but this machine: python -m benchmarks [NUM_EVENTS]."""

import subprocess
import sys
import tempfile
from pathlib import Path

ENGINES = ("ray_data", "daft", "daft_flight", "distrl")
DEFAULT_EVENTS = "5000000"


def main() -> None:
    script = str(Path(__file__).with_name("prepare_engines.py"))
    num_events = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_EVENTS
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder:
        events = f"{folder}/events"
        subprocess.run([sys.executable, script, "generate", events, num_events], check=True)
        for engine in ENGINES:
            print(f"== prepare, {num_events} events: {engine}", flush=True)
            subprocess.run(
                [sys.executable, script, engine, events, f"{folder}/{engine}"], check=True
            )


if __name__ == "__main__":
    main()
