"""A study's one table: means and deviations over seeds, as CSV and as Markdown."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from distrl.study.judging import ALL, Figures, Judged
from distrl.study.trials import Trial
from distrl.train.monitor import SELECT_BY

VALIDATION = "validation/kept/ndcg_at_10"


@dataclass(frozen=True, slots=True)
class Row:
    """One variant with its values, under one evaluation, for users of one bucket of lengths."""

    variant: str
    values: Mapping[str, Any]
    label: str
    evaluation: str
    length: str
    num_users: int
    num_seeds: int
    """Trials that were trained and judged; fewer than the study's seeds where some failed."""
    means: Mapping[str, float]
    """`kept/ndcg_at_10`, ... on the test split, VALIDATION, and `best_epoch`, `epochs`, `seconds`,
    `targets_per_s` of training."""
    deviations: Mapping[str, float]
    """Sample deviations over seeds; not a number where there is one seed."""


def rows(trials: Sequence[Trial], judged: Sequence[Judged], *, by_length: bool) -> list[Row]:
    """The table's rows, in the order of the trials.

    Args:
        trials: All of the study; those of one label differ by their seed.
        judged: What came of them; a trial that failed is missing.
        by_length: Whether to tell buckets of lengths apart, besides all users.
    """
    of_trial = {one.trial: one for one in judged}
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.label, []).append(trial)
    found = []
    for group in groups.values():
        seeds = [of_trial[trial.name] for trial in group if trial.name in of_trial]
        if seeds:
            for place, first in enumerate(seeds[0].figures):
                if first.length == ALL or (by_length and first.num_users):
                    found.append(_row(group[0], first, seeds, place))
    return found


def _row(trial: Trial, first: Figures, seeds: Sequence[Judged], place: int) -> Row:
    samples = [_sample(one, one.figures[place]) for one in seeds]
    return Row(
        variant=trial.variant,
        values=trial.values,
        label=trial.label,
        evaluation=first.evaluation,
        length=first.length,
        num_users=first.num_users,
        num_seeds=len(seeds),
        means={key: mean(sample[key] for sample in samples) for key in samples[0]},
        deviations={
            key: stdev(sample[key] for sample in samples) if len(samples) > 1 else math.nan
            for key in samples[0]
        },
    )


def _sample(judged: Judged, figures: Figures) -> dict[str, float]:
    return {
        VALIDATION: judged.best.metrics[SELECT_BY],
        **figures.metrics,
        "best_epoch": float(judged.best.epoch),
        "epochs": float(judged.last.epoch),
        "seconds": judged.last.seconds,
        "targets_per_s": judged.last.targets_per_s,
    }


def as_csv(table: Sequence[Row]) -> str:
    """Every figure: `<name>_mean` and `<name>_std`, empty where it is not a number."""
    lines = []
    for row in table:
        line = {"variant": row.variant, **row.values, "evaluation": row.evaluation}
        line |= {"length": row.length, "num_users": row.num_users, "num_seeds": row.num_seeds}
        for key, value in row.means.items():
            deviation = row.deviations[key]
            line |= {f"{key}_mean": value}
            line |= {f"{key}_std": "" if math.isnan(deviation) else deviation}
        lines.append(line)
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_markdown(table: Sequence[Row], cutoffs: Sequence[int]) -> str:
    """The figures that one reads first: HR and NDCG with seen items kept, NDCG masked."""
    largest = cutoffs[-1]
    columns = {
        "val. NDCG@10": VALIDATION,
        **{f"HR@{k}": f"kept/hr_at_{k}" for k in cutoffs},
        **{f"NDCG@{k}": f"kept/ndcg_at_{k}" for k in cutoffs},
        f"masked NDCG@{largest}": f"masked/ndcg_at_{largest}",
    }
    several = {name: len({getattr(row, name) for row in table}) > 1 for name in _PLACES}
    places = [name for name in _PLACES if several[name]]
    head = ["variant", *places, *(["users"] if several["length"] else []), "seeds"]
    lines = [[*head, *columns, "epochs", "seconds"]]
    for row in table:
        line = [row.label, *(str(getattr(row, name)) for name in places)]
        line += [f"{row.num_users:,}"] if several["length"] else []
        line += [str(row.num_seeds), *(_figure(row, key) for key in columns.values())]
        lines.append([*line, f"{row.means['epochs']:.1f}", f"{row.means['seconds']:.0f}"])
    bar = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], bar, *lines[1:]]) + "\n"


_PLACES = ("evaluation", "length")


def _figure(row: Row, key: str) -> str:
    deviation = row.deviations[key]
    spread = "" if math.isnan(deviation) else f" ± {deviation:.4f}"
    return f"{row.means[key]:.4f}{spread}"
