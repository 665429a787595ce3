"""The pictures of a sweep: latent size against what matters, and which settings mattered."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fae.pipelines.config.sections import ObjectiveSection

from .spaces import Settings, label
from .trials import FINISHED

PANELS = (
    ("autoencoder/mse", "feature error (MSE)"),
    ("probe/knn_latent", "k-NN accuracy of latents"),
    ("evaluation/frechet_backbone", "Fréchet distance"),
    ("latents/bytes_per_image", "bytes per image"),
)
"""What the page draws against the latent's size, where trials have it."""
LATENT_DIM = "autoencoder.latent_dim"
BYTES = "latents/bytes_per_image"
SEED = "seed"


@dataclass(frozen=True)
class Row:
    """One recorded trial: `metrics` are STAGE/NAME numbers."""

    key: str
    state: str
    settings: Settings
    metrics: Mapping[str, float]
    latent_dim: int


def draw(
    rows: Sequence[Row], front: Sequence[Row], objectives: Sequence[ObjectiveSection]
) -> bytes:
    """A PNG: latent size against each of `PANELS`, then bytes per image against the first objective.

    A colour for each kind of encoder; lines are means over trials of equal size; the Pareto front is starred.
    """
    from matplotlib.figure import Figure

    panels = [(metric, title) for metric, title in PANELS if any(metric in r.metrics for r in rows)]
    first = objectives[0].metric
    against_bytes = [r for r in rows if BYTES in r.metrics and first in r.metrics]
    count = len(panels) + bool(against_bytes)
    columns = min(3, max(count, 1))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis, (metric, title) in zip(axes, panels, strict=False):
        known = [row for row in rows if metric in row.metrics]
        points = {row.key: (float(row.latent_dim), row.metrics[metric]) for row in known}
        _scatter(axis, known, points, front)
        axis.set(title=title, xlabel="latent channels", xscale="log")
        sizes = sorted({row.latent_dim for row in rows})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    if against_bytes:
        axis = axes[len(panels)]
        points = {row.key: (row.metrics[BYTES], row.metrics[first]) for row in against_bytes}
        _scatter(axis, against_bytes, points, front)
        axis.set(title=f"{first}; ★ Pareto front", xlabel="bytes per image", xscale="log")
        axis.minorticks_off()
        sizes = sorted({int(x) for x, _ in points.values()})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    return _png(figure)


def draw_importance(importances: Mapping[str, Mapping[str, float]]) -> bytes:
    """A PNG of bars: the share of each objective's variance that each setting explains alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(importances), 2.6), layout="constrained")
    axes = figure.subplots(1, len(importances), squeeze=False)[0]
    for axis, (metric, shares) in zip(axes, importances.items(), strict=True):
        names = list(shares)[::-1]
        axis.barh(names, [shares[name] for name in names])
        axis.set(title=metric, xlim=(0, 1), xlabel="share of variance explained alone")
    return _png(figure)


def _scatter(
    axis: Any,
    rows: Sequence[Row],
    points: Mapping[str, tuple[float, float]],
    front: Sequence[Row],
) -> None:
    starred = {row.key for row in front}
    series: dict[str, list[Row]] = {}
    for row in rows:
        others = {
            key: value for key, value in row.settings.items() if key not in (SEED, LATENT_DIM)
        }
        series.setdefault(label(others) or "trials", []).append(row)
    # Many continuous settings would make a line each; then one colour says enough.
    if len(series) > 6:
        series = {"trials": list(rows)}
    for name, members in series.items():
        means: dict[float, list[float]] = {}
        for row in members:
            if row.state == FINISHED:
                means.setdefault(points[row.key][0], []).append(points[row.key][1])
        xs = sorted(means)
        (line,) = axis.plot(xs, [statistics.fmean(means[x]) for x in xs], alpha=0.6, label=name)
        for row in members:
            on_front = row.key in starred
            style = {"marker": "*", "s": 130} if on_front else {"marker": "o", "s": 22}
            hollow = row.state != FINISHED
            colour = "none" if hollow else line.get_color()
            axis.scatter(*points[row.key], facecolors=colour, edgecolors=line.get_color(), **style)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=8)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
