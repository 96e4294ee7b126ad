"""The whole road on MovieLens 100K: raw log, store, a Ray cluster, MCLRec, evaluation, promotion.

    make quickstart

Everything it makes lies in data/ml-100k and runs/; doing it again trains again under new names.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from distrl.errors import DistrlError
from distrl.tracking.config import TrackingConfig, masked, resolve_tracking_uri
from jobs.command import run
from jobs.local_head import RAY, ray_head
from jobs.movielens import fetch

DATA, RUNS = Path("data/ml-100k"), Path("runs")
STORE = DATA / "store"
LOGICAL_CPUS = 6
"""More than a laptop has: workers, reading and ranking are processes that share the real ones."""
REJECTED = 1
"""Exit status of a promotion whose candidate was not better, which is an answer too."""


def main() -> None:
    """Runs every step, each as a user would type it."""
    description, layout = __doc__, argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=layout).parse_args()
    started = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    fetch(DATA)
    _job("prepare", ["jobs/prepare.py", "configs/prepare/quickstart.yaml"])
    names = {method: f"quickstart-{method}-{stamp}" for method in ("mclrec", "sasrec")}
    with ray_head(LOGICAL_CPUS, DATA / "ray-head.log") as (address, environment):
        for method, name in names.items():
            _submit(address, environment, method, name)
    outcomes = {
        method: json.loads((RUNS / name / "result.json").read_text())
        for method, name in names.items()
    }
    version, folder = outcomes["mclrec"]["version"], RUNS / names["mclrec"]
    model = f"model_uri=models:/quickstart/{version}"
    output = f"output_uri={folder / 'evaluation'}"
    _job("evaluate", ["jobs/evaluate.py", "configs/evaluate.yaml", model, output])
    _job("promote", ["jobs/promote.py", "configs/promote.yaml", f"version={version}"], REJECTED)
    _close(outcomes, time.monotonic() - started)


def _job(name: str, arguments: list[str], *accepted: int) -> None:
    """Runs one job in the open, and ends the quickstart if it fails."""
    print(f"\n== {name}: python {' '.join(arguments)}", flush=True)
    _checked(name, [sys.executable, *arguments], None, accepted)


def _submit(address: str, environment: dict[str, str], method: str, name: str) -> None:
    """Submits one training job to the running cluster, as to any other."""
    command = [
        "job", "submit", "--address", address, "--runtime-env", "cluster/runtime_env.yaml",
        "--working-dir", ".", "--", "python", f"jobs/train_{method}.py", "configs/quickstart.yaml",
        f"name={name}", f"storage_uri={RUNS.resolve()}", f"data.store_uri={STORE.resolve()}",
    ]  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        command.append(f"commit={commit.stdout.strip()}")
    if method == "sasrec":
        command.append("method={name: sasrec, updates_per_batch: 2}")
    print(f"\n== train {method}: ray {' '.join(command)}", flush=True)
    command[command.index("python")] = sys.executable
    _checked(f"train {method}", [RAY, *command], environment, ())


def _checked(
    name: str, command: list[str], environment: dict[str, str] | None, accepted: tuple[int, ...]
) -> None:
    status = subprocess.run(command, env=environment, check=False).returncode
    if status not in (0, *accepted):
        raise DistrlError(f"quickstart: {name} ended with status {status}")


def _close(outcomes: dict[str, dict], seconds: float) -> None:
    """The closing table, the pictures, and where to look next."""
    contender, control = outcomes["mclrec"], outcomes["sasrec"]
    lines = {
        "MCLRec": contender["metrics"],
        "CE-SASRec": control["metrics"],
        "popularity": contender["baselines"]["popularity"],
    }
    for policy in ("kept", "masked"):
        names = [f"{metric}_at_{k}" for metric in ("hr", "ndcg") for k in (5, 10, 20)]
        print(f"\nMovieLens 100K, test split, whole catalog ranked, seen items {policy}, seed 0")
        print(" " * 12 + "".join(f"{name.replace('_at_', '@').upper():>9}" for name in names))
        for label, metrics in lines.items():
            row = "".join(f"{metrics[f'{policy}/{name}']:9.4f}" for name in names)
            print(f"{label:12}{row}")
    print()
    for outcome in (contender, control):
        speed = outcome["speed"]
        print(
            f"{outcome['name']}: {speed['epoch_s']:.1f} s an epoch, "
            f"{speed['targets_per_s']:,.0f} targets/s, "
            f"{100 * speed['wait_share']:.1f}% of the time waiting for data"
        )
        for picture in outcome["pictures"].values():
            print(f"  picture: {picture}")
    uri = masked(resolve_tracking_uri(TrackingConfig(), str(RUNS)))
    print(f"\nThe whole road took {seconds / 60:.1f} minutes. Runs, curves and models:")
    mlflow = Path(sys.executable).with_name("mlflow")
    print(f"  {uri}" if uri.startswith("http") else f"  {mlflow} ui --backend-store-uri {uri}")


if __name__ == "__main__":
    run(main)
