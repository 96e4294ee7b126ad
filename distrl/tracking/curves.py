"""The curves of a run as MLflow holds them, and their picture."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distrl.tracking.connection import speaking_to

Curve = list[tuple[int, float]]

WAIT_SHARE = "system/wait_share"
VIEWS = "views/"
COLLAPSE = {
    "/alignment": "alignment of the views of a pair (0: identical)",
    "/uniformity": "uniformity of views (nats; 0: one point)",
    "/effective_rank": "effective rank of views (1: one line)",
}
"""Diagnostics that are drawn, by the end of their names."""


def curves(uri: str, run_id: str) -> dict[str, Curve]:
    """Points (global step, value) of every metric of a run that has at least two.

    Raises:
        TrackingError: If MLflow cannot be reached or has no such run.
    """
    found = {}
    with speaking_to(uri, f"read the curves of run {run_id}") as client:
        for name in client.get_run(run_id).data.metrics:
            points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
            if len(points) > 1:
                found[name] = points
    return found


def picture(found: dict[str, Curve], title: str) -> bytes:
    """A PNG: loss terms of every phase, validation metrics, and how long workers wait for data.

    Where views were measured, a second row shows whether they collapse.
    """
    panels = [
        ("loss terms, unweighted (nats)", [name for name in found if _is_term(name)]),
        ("validation, seen items kept", [name for name in found if _is_validation(name)]),
        ("share of time waiting for data", [name for name in found if name == WAIT_SHARE]),
    ]
    if any(name.startswith(VIEWS) for name in found):
        panels += [
            (label, [name for name in found if name.startswith(VIEWS) and name.endswith(ending)])
            for ending, label in COLLAPSE.items()
        ]
    rows = len(panels) // 3
    figure = Figure(figsize=(20, 4.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(rows, 3, squeeze=False).flat
    for axes, (label, names) in zip(drawn, panels, strict=True):
        for name in sorted(names):
            steps, values = zip(*found[name], strict=True)
            style = "o-" if len(steps) < 40 else "-"
            axes.plot(steps, values, style, markersize=3, label=name)
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        # Everything but uniformity is zero or more; zero is where uniformity says collapse.
        axes.set_ylim(**{"top" if label == COLLAPSE["/uniformity"] else "bottom": 0})
        if names:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    return image.getvalue()


def _is_term(name: str) -> bool:
    others = ("val/", "test/", "system/", "epoch", VIEWS)
    return not name.startswith(others) and not name.endswith("/total")


def _is_validation(name: str) -> bool:
    return name.startswith(("val/ndcg_at", "val/hr_at"))
