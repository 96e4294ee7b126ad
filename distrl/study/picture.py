"""A study's one picture: the figure that decides, with its deviation over seeds."""

import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from distrl.study.config import Choice, LogUniform, StudyConfig
from distrl.study.table import ALL, VALIDATION, Row
from distrl.study.trials import shown

Place = Callable[[Row], str]


@dataclass(frozen=True, slots=True)
class _Axes:
    """What the horizontal axis shows, what a line is, and the axis's name."""

    x: Place
    line: Place
    name: str

    def places(self, points: Sequence[Row]) -> list[str]:
        """Along the axis, in the order of the table."""
        return list(dict.fromkeys(self.x(row) for row in points))

    def lines(self, points: Sequence[Row]) -> dict[str, list[Row]]:
        """The points of each line."""
        found: dict[str, list[Row]] = {}
        for row in points:
            found.setdefault(self.line(row), []).append(row)
        return found


def picture(study: StudyConfig, table: Sequence[Row], cutoff: int) -> bytes:
    """A PNG.

    A search shows the validation score over each key it drew. Any other study shows NDCG on the
    test split, seen items kept, over what it varies: lengths, evaluations, the last key of its
    grid, or its variants, with a line for each of the rest; `relative` adds a panel in which each
    line is a share of its own first point.
    """
    if study.search:
        return _drawn(_searched(study, table))
    figure, panels = _figure(2 if study.relative else 1, width=6.0, same_scale=False)
    points = [row for row in table if (row.length == ALL) != study.by_length]
    metric = f"kept/ndcg_at_{cutoff}"
    axes = _axes(study)
    _lines(panels[0], axes, points, metric)
    panels[0].set_ylabel(f"test NDCG@{cutoff}, seen items kept")
    panels[0].set_title(f"{study.name}: {_seeds(len(study.seeds))}", fontsize=9)
    if study.relative:
        _shares(panels[1], axes, points, metric)
        panels[1].set_ylabel(f"share that is left of the first NDCG@{cutoff}")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if any(axes.line(row) for row in points):
        panels[0].legend(fontsize=8)
    return _drawn(figure)


def _lines(panel: Axes, axes: _Axes, points: Sequence[Row], metric: str) -> None:
    """The figures themselves, with their deviation over seeds."""
    places = axes.places(points)
    for label, of_line in axes.lines(points).items():
        panel.errorbar(
            [places.index(axes.x(row)) for row in of_line],
            [row.means[metric] for row in of_line],
            yerr=[row.deviations[metric] if row.num_seeds > 1 else 0.0 for row in of_line],
            marker="o",
            capsize=3,
            linestyle="-" if axes.name else "none",
            label=label or None,
        )
    _named(panel, axes, places)


def _shares(panel: Axes, axes: _Axes, points: Sequence[Row], metric: str) -> None:
    """What is left of each line's first point; no deviation, as seeds are not told apart here."""
    places = axes.places(points)
    for of_line in axes.lines(points).values():
        by_place = {places.index(axes.x(row)): row.means[metric] for row in of_line}
        found = shares_of_first(by_place)
        panel.plot(list(found), list(found.values()), marker="o")
    _named(panel, axes, places)


def shares_of_first(by_place: Mapping[int, float]) -> dict[int, float]:
    """A line's figures by place, as shares of the one at place 0.

    Empty where that one is missing, because its trial failed, or 0.
    """
    first = by_place.get(0, 0.0)
    return {place: figure / first for place, figure in by_place.items()} if first else {}


def _named(panel: Axes, axes: _Axes, places: Sequence[str]) -> None:
    panel.set_xticks(range(len(places)), places, rotation=0 if axes.name else 30, fontsize=8)
    panel.set_xlabel(axes.name)
    panel.grid(alpha=0.3)


def _axes(study: StudyConfig) -> _Axes:
    if study.by_length:
        several = len(study.evaluations) > 1
        return _Axes(
            lambda row: f"{row.length}\n({row.num_users:,} users)",
            lambda row: f"{row.label} {row.evaluation}" if several else row.label,
            "length of the user's sequence",
        )
    if len(study.evaluations) > 1:
        return _Axes(lambda row: row.evaluation, lambda row: row.label, "evaluation")
    if study.grid:
        *others, last = study.grid
        short = short_names(study.grid[last])
        return _Axes(
            lambda row: short[shown(row.values[last])],
            lambda row: " ".join(
                [
                    *([row.variant] if study.variants else []),
                    *(f"{key.rpartition('.')[2]}={shown(row.values[key])}" for key in others),
                ]
            ),
            last,
        )
    return _Axes(lambda row: row.label, lambda row: "", "")


def short_names(values: Sequence[object]) -> dict[str, str]:
    """How values are written below an axis: paths by their last part where those all differ."""
    texts = [shown(value) for value in values]
    ends = [text.rstrip("/").rpartition("/")[2] for text in texts]
    return dict(zip(texts, ends if len(set(ends)) == len(set(texts)) else texts, strict=True))


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


def _figure(
    count: int, *, width: float = 4.0, same_scale: bool = True
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(7.0, width * count), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, sharey=same_scale, squeeze=False)[0])


def _drawn(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()


def _seeds(count: int) -> str:
    return f"mean and deviation over {count} seeds" if count > 1 else "one seed"
