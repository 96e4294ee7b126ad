"""A study's one picture: the figure that decides, with its deviation over seeds."""

import io
from collections.abc import Callable, Hashable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from distrl.study.config import Choice, LogUniform, StudyConfig
from distrl.study.table import ALL, VALIDATION, Row
from distrl.study.trials import shown

Place = Callable[[Row], str]


def picture(study: StudyConfig, table: Sequence[Row], cutoff: int) -> bytes:
    """A PNG.

    A search shows the validation score over each key it drew. Any other study shows NDCG on the
    test split, seen items kept, over what it varies: lengths, evaluations, the last key of its
    grid, or its variants, with a line for each of the rest.
    """
    if study.search:
        return _drawn(_searched(study, table))
    figure, (panel,) = _figure(1)
    x, line, name = _axes(study)
    points = [row for row in table if (row.length == ALL) != study.by_length]
    metric = f"kept/ndcg_at_{cutoff}"
    places = list(dict.fromkeys(x(row) for row in points))
    for label in dict.fromkeys(line(row) for row in points):
        of_line = [row for row in points if line(row) == label]
        panel.errorbar(
            [places.index(x(row)) for row in of_line],
            [row.means[metric] for row in of_line],
            yerr=[row.deviations[metric] if row.num_seeds > 1 else 0.0 for row in of_line],
            marker="o",
            capsize=3,
            linestyle="-" if name else "none",
            label=label or None,
        )
    panel.set_xticks(range(len(places)), places, rotation=0 if name else 30, fontsize=8)
    panel.set_xlabel(name)
    panel.set_ylabel(f"test NDCG@{cutoff}, seen items kept")
    panel.set_title(f"{study.name}: {_seeds(len(study.seeds))}", fontsize=9)
    panel.grid(alpha=0.3)
    if any(line(row) for row in points):
        panel.legend(fontsize=8)
    return _drawn(figure)


def _axes(study: StudyConfig) -> tuple[Place, Place, str]:
    """What the horizontal axis shows, what a line is, and the axis's name."""
    if study.by_length:
        several = len(study.evaluations) > 1
        return (
            lambda row: f"{row.length}\n({row.num_users:,} users)",
            lambda row: f"{row.label} {row.evaluation}" if several else row.label,
            "length of the user's sequence",
        )
    if len(study.evaluations) > 1:
        return lambda row: row.evaluation, lambda row: row.label, "evaluation"
    if study.grid:
        *others, last = study.grid
        return (
            lambda row: shown(row.values[last]),
            lambda row: " ".join(
                [
                    *([row.variant] if study.variants else []),
                    *(f"{key.rpartition('.')[2]}={shown(row.values[key])}" for key in others),
                ]
            ),
            last,
        )
    return lambda row: row.label, lambda row: "", ""


def _searched(study: StudyConfig, table: Sequence[Row]) -> Figure:
    """A panel for each key."""
    figure, panels = _figure(len(study.search))
    for panel, (key, distribution) in zip(panels, study.search.items(), strict=True):
        for variant in dict.fromkeys(row.variant for row in table):
            drawn = [row for row in table if row.variant == variant]
            values: list[Hashable] = [row.values[key] for row in drawn]
            if isinstance(distribution, Choice):
                choices = [shown(choice) for choice in distribution.choice]
                values = [choices.index(shown(value)) for value in values]
                panel.set_xticks(range(len(choices)), choices)
                panel.set_xlim(-0.5, len(choices) - 0.5)
            scores = [row.means[VALIDATION] for row in drawn]
            panel.scatter(values, scores, label=variant if study.variants else None)  # pyright: ignore[reportArgumentType]
        if isinstance(distribution, LogUniform):
            panel.set_xscale("log")
            panel.set_xlim(distribution.loguniform)
            panel.xaxis.set_minor_formatter(NullFormatter())  # its labels would overlap
        panel.set_xlabel(key)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation NDCG@10, seen items kept")
    if study.variants:
        panels[-1].legend(fontsize=8)
    return figure


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(7.0, 4.0 * count), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _drawn(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()


def _seeds(count: int) -> str:
    return f"mean and deviation over {count} seeds" if count > 1 else "one seed"
