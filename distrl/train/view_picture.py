"""Maps of views as people and programs read them: a picture, a table, CSV and JSON."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from distrl.train.view_maps import ViewMap

KINDS = {"data": "data views (h)", "learned": "learned views (z)"}
COLORS = ("#1f77b4", "#e8743b")


def picture(maps: Sequence[ViewMap], *, num_lines: int) -> bytes:
    """A PNG: a column for each model, a row for each kind of view, some pairs joined by lines.

    Args:
        maps: In the order of the columns.
        num_lines: Pairs that are joined, the first ones.
    """
    labels = list(dict.fromkeys(one.label for one in maps))
    kinds = list(dict.fromkeys(one.kind for one in maps))
    size = (5.2 * len(labels), 5.6 * len(kinds) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kinds), len(labels), squeeze=False)
    found = {(one.kind, one.label): one for one in maps}
    for row, kind in enumerate(kinds):
        for column, label in enumerate(labels):
            _draw(panels[row, column], found.get((kind, label)), num_lines)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, markerscale=2)
    figure.suptitle("t-SNE of both views of the same pairs (distances and axes have no unit)")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=90, metadata={"Software": None})
    return image.getvalue()


def _draw(axes: Axes, one: ViewMap | None, num_lines: int) -> None:
    """One panel, empty where a model has no such views."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("0.8")
    if one is None:
        axes.set_axis_off()
        return
    joined = np.stack([one.first, one.second], axis=1)[:num_lines]
    axes.add_collection(
        LineCollection(
            list(joined), colors="0.3", linewidths=0.5, alpha=0.4, label="views of one sequence"
        )
    )
    axes.scatter(*one.first.T, s=7, color=COLORS[0], alpha=0.7, linewidths=0, label="first view")
    # Rings, so that a pair in one place is a dot in a ring and not one color over another.
    axes.scatter(
        *one.second.T, s=13, facecolors="none", edgecolors=COLORS[1], alpha=0.8, linewidths=0.6,
        label="second view",
    )  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(f"{one.label}: {KINDS.get(one.kind, one.kind)}", fontsize=11)
    axes.set_xlabel(_figures(one), fontsize=9)


def _figures(one: ViewMap) -> str:
    values = one.diagnostics
    return (
        f"alignment {values['alignment']:.3f}   uniformity {values['uniformity']:.2f}\n"
        f"effective rank {values['effective_rank']:.1f} of {one.hidden_size}   "
        f"norm {values['norm']:.2f}"
    )


def table(maps: Sequence[ViewMap]) -> str:
    """The diagnostics of each map, a line each."""
    names = list(maps[0].diagnostics)
    width = max(len(one.label) for one in maps)
    lines = [f"{'':{width}}  {'views':8}" + "".join(f"{name:>16}" for name in names)]
    for one in maps:
        values = "".join(f"{one.diagnostics[name]:16.4f}" for name in names)
        lines.append(f"{one.label:{width}}  {one.kind:8}{values}")
    return "\n".join(lines)


def as_csv(maps: Sequence[ViewMap]) -> str:
    """A row for each point: model, kind, pair, view 1 or 2, whether its newest item is masked."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "pair", "view", "newest_hidden", "x", "y"])
    for one in maps:
        for view, points in enumerate((one.first, one.second), start=1):
            for pair, (x, y) in enumerate(points):
                hidden = int(one.hidden[view - 1][pair])
                writer.writerow([one.label, one.kind, pair, view, hidden, f"{x:.4f}", f"{y:.4f}"])
    return text.getvalue()


def as_json(maps: Sequence[ViewMap]) -> list[dict[str, Any]]:
    """The diagnostics of each map."""
    return [
        {
            "model": one.label,
            "kind": one.kind,
            "num_pairs": len(one.first),
            "hidden_size": one.hidden_size,
            **one.diagnostics,
        }
        for one in maps
    ]
