"""How fast is a training step? Against padded prefixes, and against the machine's limit.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --profile        # and torch's profiler, where the time goes

CE-SASRec and MCLRec on Beauty at the paper's sizes, one process with two threads, without Ray.
Packed: every position of 256 users. Prefix: 256 prefixes a step, as in the papers, packed by us, or
padded to rows of 50 as in the authors' code. All of it runs in turns in one process, and so do the
products and copies whose rates make the limit (benchmarks/roofline.py says what is counted).
"""

import io
import sys
from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from benchmarks.rates import candidates
from benchmarks.record import Record, Table, arguments
from benchmarks.roofline import Rates, Work, limit_s, limit_with_softmax_s, step_work
from benchmarks.step_cases import Case, cases
from benchmarks.store import training_store
from benchmarks.timing import Timing, interleaved
from distrl.contract import Batch
from distrl.data.store import read_manifest
from distrl.engine.collectives import ensure_process_group

AUTHORS_TARGETS_PER_S = 130
"""The authors' MCLRec code on another such machine, its own command: 1.97 s for a batch of 256
prefixes with its three steps. Not measured by this script."""
GOAL_OF_AUTHORS, GOAL_OF_LIMIT = 40, 0.5


def rates(times: dict[str, Timing], amounts: dict[str, float]) -> Rates:
    """The machine's best, by kind, of medians over the runs."""
    best: dict[str, float] = {}
    for name, amount in amounts.items():
        kind = name.partition("/")[0]
        best[kind] = max(best.get(kind, 0.0), amount / times[name].median_s)
    return Rates(best["fp32"], best["bf16"], best["cache"], best["memory"], best["exponentials"])


def measure(made: list[Case], runs: int) -> tuple[dict[str, Timing], Rates]:
    """Times of some steps of each case, and of the machine's limits between them."""
    done: dict[str, list[Batch]] = {case.name: [] for case in made}

    def several(case: Case) -> Callable[[], object]:
        return lambda: done[case.name].extend(case.step() for _ in range(case.steps))

    limits = candidates()
    alternatives = {case.name: several(case) for case in made}
    times = interleaved(alternatives | {name: run for name, (_, run) in limits.items()}, runs)
    found = rates(times, {name: amount for name, (amount, _) in limits.items()})
    for case in made:
        seen = done[case.name][case.steps :]  # the first round is warming up
        method = case.engines.method
        case.targets = sum(batch.num_targets for batch in seen) / len(seen) * case.steps
        works = [step_work(method, case.config, batch) for batch in seen]
        case.work = sum(works, Work()).times(1 / len(works))
    return times, found


def tables(made: list[Case], times: dict[str, Timing], found: Rates, record: Record) -> None:
    """What was found, as two tables."""
    record.figures["rates"] = vars(found)
    record.table(
        Table(
            "What the machine does, with the same threads",
            (
                "fp32 GFLOP/s",
                "bf16 GFLOP/s",
                "copy in cache GB/s",
                "copy in memory GB/s",
                "exp G/s",
            ),
            [[value / 1e9 for value in vars(found).values()]],
        )
    )
    base = {c.method: c.targets / times[c.name].median_s for c in made if c.batch == "padded"}
    rows = []
    for case in made:
        took = times[case.name]
        speed = case.targets / took.median_s
        share = limit_s(case.work, found) * case.steps / took.median_s
        softmax = limit_with_softmax_s(case.work, found) * case.steps / took.median_s
        of_authors = speed / AUTHORS_TARGETS_PER_S
        record.figures[case.name] = {
            "targets_per_s": speed,
            "share_of_limit": share,
            "share_of_limit_with_softmax": softmax,
            "of_padded": speed / base[case.method],
            "of_authors_code_elsewhere": of_authors,
            "steps_s": vars(took),
            "work_of_a_step": vars(case.work),
        }
        # The authors' figure is of three steps a batch; other methods have none to compare with.
        authors = f"{of_authors:.0f} x" if case.method.startswith("MCLRec") else ""
        rows.append(
            (case.method, case.batch, case.products, speed, took.spread,
             f"{speed / base[case.method]:.1f} x",
             (case.work.fp32_flops + case.work.bf16_flops) / 1e9,
             f"{share:.0%}", f"{softmax:.0%}", authors)
        )  # fmt: skip
    header = ("method", "batch", "products", "targets/s", "spread", "of padded",
              "GFLOP a step", "of the limit", "with exp", "of the authors' 130/s")  # fmt: skip
    record.table(Table("Targets a second", header, rows))


def picture(record: Record, made: list[Case]) -> None:
    """Targets a second and the limit, as bars."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [case.name.replace(" | ", ", ") for case in made]
    speeds = [record.figures[case.name]["targets_per_s"] for case in made]
    limits = [
        record.figures[case.name]["targets_per_s"] / record.figures[case.name]["share_of_limit"]
        for case in made
    ]
    axes.barh(names, limits, color="#dddddd", label="limit of the machine")
    axes.barh(names, speeds, color="#3366aa", height=0.5, label="measured")
    axes.invert_yaxis()
    axes.set_xlabel("targets a second")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    (record.folder / "training_step.png").write_bytes(image.getvalue())


def profile(case: Case) -> str:
    """Torch's table of ten steps."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as found:
        for _ in range(10):
            case.step()
    averages = found.key_averages(group_by_input_shape=True)
    return averages.table(
        sort_by="self_cpu_time_total",
        row_limit=40,
        max_name_column_width=36,
        max_shapes_column_width=70,
    )


def main() -> int:
    """Measures, prints, writes."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each alternative")
    parser.add_argument("--profile", action="store_true", help="profile MCLRec's packed step")
    args = parser.parse_args()
    steps, runs = (1, 2) if args.quick else (6, args.runs)
    torch.set_num_threads(args.threads)
    ensure_process_group("gloo")
    record = Record("training_step", args)
    store, note = training_store()
    record.note(f"{note} {args.threads} threads, {runs} runs of {steps} steps in turns.")
    made = cases(read_manifest(store), store, steps, steps * (runs + 1))
    times, found = measure(made, runs)
    tables(made, times, found, record)
    best = max(
        (record.figures[c.name] for c in made if c.method.startswith("MCLRec")),
        key=lambda figures: figures["targets_per_s"],
    )
    record.note(
        f"MCLRec at its best: {best['of_authors_code_elsewhere']:.0f} times the authors' code "
        f"(goal {GOAL_OF_AUTHORS}; their {AUTHORS_TARGETS_PER_S}/s was measured elsewhere), "
        f"{best['share_of_limit']:.0%} of the limit (goal {GOAL_OF_LIMIT:.0%})."
    )
    record.write()
    picture(record, made)
    if args.profile:
        print(profile(next(c for c in made if "MCLRec" in c.name and c.products == "bf16")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
