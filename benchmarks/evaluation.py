"""How fast is ranking every user against the whole catalog? Against one product and topk.

    python -m benchmarks.evaluation

`distrl.train.evaluate.evaluate_local` on the test split, seen items kept and masked, baselines left
out: reading shards, encoding histories, exact ranks. The limit is a dense product of states that
are there already with all item vectors, and the 20 best of each row: what a plain script would take
for the scores alone. Both in turns in one process, with one and with two threads.
"""

import sys
from collections.abc import Callable

import torch

from benchmarks.record import Record, Table, arguments
from benchmarks.store import training_store
from benchmarks.timing import Timing, interleaved
from distrl.contract import Catalog, Method
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.store import read_manifest
from distrl.methods import build, parse_method
from distrl.train.evaluate import evaluate_local

MAX_LEN, BEST = 50, 20
USERS_AT_ONCE = 1024
"""Of the dense product: all users' scores at once would be 2 GB in float64."""
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def dense(num_users: int, num_items: int, hidden: int, dtype: torch.dtype) -> Callable[[], object]:
    """Product and topk over all users."""
    states = torch.randn(num_users, hidden, dtype=dtype)
    vectors = torch.randn(num_items, hidden, dtype=dtype)

    def run() -> None:
        for part in states.split(USERS_AT_ONCE):
            (part @ vectors.T).topk(BEST)

    return run


def ranking(method: Method, store: str, dtype: str) -> Callable[[], object]:
    """The whole test split."""
    config = EvaluationConfig(dtype=dtype, num_workers=0)
    return lambda: evaluate_local(method, MAX_LEN, store, "test", config, baselines=False)


def measure(method: Method, store: str, num_users: int, runs: int) -> dict[str, Timing]:
    """Both ways in both precisions, by `way/dtype`."""
    vectors = method.item_vectors
    alternatives = {}
    for name, dtype in DTYPES.items():
        alternatives[f"ranking/{name}"] = ranking(method, store, name)
        alternatives[f"dense/{name}"] = dense(num_users, *vectors.shape, dtype)
    return interleaved(alternatives, runs)


def main() -> int:
    """Measures, prints, writes."""
    args = arguments(__doc__).parse_args()
    record = Record("evaluation", args)
    store, note = training_store()
    manifest = read_manifest(store)
    runs = 1 if args.quick else 3
    record.note(f"{note} {manifest.num_users:,} users; {runs} runs in turns.")
    torch.manual_seed(0)
    method = build(parse_method({"name": "sasrec"}), Catalog(manifest.num_items, MAX_LEN)).eval()
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            times = measure(method, store, manifest.num_users, runs)
        for dtype in DTYPES:
            ours, limit = times[f"ranking/{dtype}"], times[f"dense/{dtype}"]
            users_per_s = manifest.num_users / ours.median_s
            share = limit.median_s / ours.median_s
            record.figures[f"{threads} threads, {dtype}"] = {
                "users_per_s": users_per_s,
                "dense_users_per_s": manifest.num_users / limit.median_s,
                "share_of_dense": share,
                "ranking": vars(ours),
                "dense": vars(limit),
            }
            rows.append(
                (threads, dtype, users_per_s, ours.spread, manifest.num_users / limit.median_s,
                 f"{share:.0%}")
            )  # fmt: skip
    header = ("threads", "encoder", "users/s", "spread", "dense users/s", "of dense")
    record.table(Table("Full-catalog ranking", header, rows))
    record.note("Scores are exact, in float64, whatever the encoder's type.")
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
