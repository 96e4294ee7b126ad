"""An evaluation as people and programs read it: tables, CSV, JSON, a picture."""

import csv
import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distrl.ops.metrics import METRICS
from distrl.train.evaluate import EvaluationResult
from distrl.train.ranker import MODEL, POPULARITY, REPEAT_RECENT, Policy

POLICY_LABELS: dict[Policy, str] = {
    "kept": "seen kept",
    "masked": "seen masked",
    "sampled99": "sampled99",
}
RANKERS = {MODEL: "model", POPULARITY: "popularity", REPEAT_RECENT: "repeat-recent"}
ALL = "all"
SAMPLED_NOTE = (
    "sampled99: each target among 99 random items new to the user, not comparable with full ranking"
)
"""What stands beside every figure of the sampled protocol."""


def rows(result: EvaluationResult) -> list[dict[str, Any]]:
    """One row for each policy, ranker and length bucket, with `length` "all" for all users.

    Rows of the sampled protocol end with a `note`, so that it goes where a row goes.
    """
    found = []
    note = {"note": SAMPLED_NOTE} if result.protocol == "sampled99" else {}
    for policy in result.policies:
        for ranker in RANKERS:
            counts = result.ranks.get(f"{ranker}/{policy}")
            if counts is None:
                continue
            whole = (ALL, counts.num_cases, counts.metrics(result.cutoffs))
            for length, num_users, metrics in [whole, *counts.by_length(result.cutoffs)]:
                about = {"policy": policy, "ranker": ranker, "length": length}
                found.append({**about, "num_users": num_users, **metrics, **note})
    return found


def main_table(result: EvaluationResult) -> str:
    """The model and the baselines over all users, each way of ranking apart."""
    sampled = result.protocol == "sampled99"
    against = "sampled99" if sampled else "the whole catalog ranked"
    title = f"{result.split} split, {result.num_users:,} users, {against}"
    notes = [SAMPLED_NOTE] if sampled else []
    if result.num_skipped:
        notes.append(f"{result.num_skipped:,} users are too short for a case")
    if result.num_unknown:
        notes.append(f"{result.num_unknown:,} cases are misses: the model does not know the items")
    names = [f"{metric}_at_{k}" for metric in METRICS for k in result.cutoffs]
    lines = [["", "", *map(_label, names)]]
    for row in rows(result):
        if row["length"] == ALL:
            figures = [f"{row[name]:.4f}" for name in names]
            lines.append([POLICY_LABELS[row["policy"]], RANKERS[row["ranker"]], *figures])
    return "\n".join([title, *notes, "", *_aligned(lines, left=2)])


def length_table(result: EvaluationResult) -> str:
    """The model by length of the user's sequence: HR and NDCG at each cutoff."""
    names = [f"{metric}_at_{k}" for metric in ("hr", "ndcg") for k in result.cutoffs]
    lines = [["", "length", "users", *map(_label, names)]]
    for row in rows(result):
        if row["ranker"] == MODEL and row["length"] != ALL and row["num_users"]:
            figures = [f"{row[name]:.4f}" for name in names]
            place = [POLICY_LABELS[row["policy"]], row["length"], f"{row['num_users']:,}"]
            lines.append([*place, *figures])
    title = "the model by length of the user's sequence, held-out items included"
    notes = [SAMPLED_NOTE] if result.protocol == "sampled99" else []
    return "\n".join([title, *notes, "", *_aligned(lines, left=2)])


def as_json(result: EvaluationResult) -> dict[str, Any]:
    """All of it, as JSON takes it; counts of ranks included, so that results can be merged."""
    return {
        "split": result.split,
        "protocol": result.protocol,
        **({"note": SAMPLED_NOTE} if result.protocol == "sampled99" else {}),
        "num_users": result.num_users,
        "num_skipped": result.num_skipped,
        "num_unknown": result.num_unknown,
        "seconds": result.seconds,
        "cutoffs": list(result.cutoffs),
        "metrics": result.metrics,
        "rows": rows(result),
        "rank_counts": {
            name: {"length_bounds": list(c.length_bounds), "counts": c.counts.tolist()}
            for name, c in result.ranks.items()
        },
    }


def as_csv(result: EvaluationResult) -> str:
    """The rows of `rows`."""
    found = rows(result)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def picture(result: EvaluationResult) -> bytes:
    """A PNG: NDCG by length of the user's sequence, model and baselines."""
    image = io.BytesIO()
    figure(result).savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()


def figure(result: EvaluationResult) -> Figure:
    """What `picture` shows: a panel for each way of ranking."""
    cutoff = 10 if 10 in result.cutoffs else result.cutoffs[-1]
    drawn = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(result.policies), sharey=True, squeeze=False)[0]
    for panel, policy in zip(panels, result.policies, strict=True):
        for ranker, label in RANKERS.items():
            chosen = [
                row
                for row in rows(result)
                if (row["policy"], row["ranker"]) == (policy, ranker)
                and row["length"] != ALL
                and row["num_users"]
            ]
            values = [row[f"ndcg_at_{cutoff}"] for row in chosen]
            # One line is drawn over another where all values are zero; each keeps its marker.
            marker = {MODEL: "o", POPULARITY: "s", REPEAT_RECENT: "^"}[ranker]
            panel.plot([_users(row) for row in chosen], values, marker=marker, label=label)
        if policy == "sampled99":
            panel.set_title(f"{result.split} split, {SAMPLED_NOTE}", fontsize="medium")
        else:
            panel.set_title(f"{result.split} split, seen items {policy}")
        panel.set_xlabel("length of the user's sequence (users)")
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"NDCG@{cutoff}")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend()
    return drawn


def _users(row: dict[str, Any]) -> str:
    return f"{row['length']}\n({row['num_users']:,})"


def _label(name: str) -> str:
    metric, _, cutoff = name.partition("_at_")
    return f"{metric.upper()}@{cutoff}"


def _aligned(lines: list[list[str]], left: int) -> list[str]:
    """Columns padded to their widest cell, the first `left` to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
