"""The figures of a sweep's report: metrics by latent size, and the importance of settings."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fae.pipelines.config.sections import ObjectiveSection

from .records import FINISHED, RecordedTrial
from .spaces import label
from .trials import LATENT_DIM, SEED

PANELS = (
    ("autoencoder/mse", "feature error (MSE)"),
    ("probe/knn_latent", "k-NN accuracy of latents"),
    ("evaluation/frechet_backbone", "Fréchet distance"),
    ("latents/bytes_per_image", "bytes per image"),
)
"""(metric, title) of what the report draws against the latent size, where trials have it."""
BYTES = "latents/bytes_per_image"


def trials_figure(
    trials: Sequence[RecordedTrial],
    front: Sequence[RecordedTrial],
    objectives: Sequence[ObjectiveSection],
) -> bytes:
    """A PNG: each of `PANELS` by latent size, then the first objective by bytes per image.

    Trials that differ in seed or latent size alone share a colour and a line, which joins the means
    of equal size. Stars mark the Pareto front `front`.
    """
    from matplotlib.figure import Figure

    panels = [
        (metric, title) for metric, title in PANELS if any(metric in t.metrics for t in trials)
    ]
    first = objectives[0].metric
    against_bytes = [t for t in trials if BYTES in t.metrics and first in t.metrics]
    count = len(panels) + bool(against_bytes)
    columns = min(3, max(count, 1))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis, (metric, title) in zip(axes, panels, strict=False):
        known = [trial for trial in trials if metric in trial.metrics]
        points = {trial.key: (float(trial.latent_dim), trial.metrics[metric]) for trial in known}
        _scatter(axis, known, points, front)
        axis.set(title=title, xlabel="latent channels", xscale="log")
        sizes = sorted({trial.latent_dim for trial in trials})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    if against_bytes:
        axis = axes[len(panels)]
        points = {
            trial.key: (trial.metrics[BYTES], trial.metrics[first]) for trial in against_bytes
        }
        _scatter(axis, against_bytes, points, front)
        axis.set(title=f"{first}; ★ Pareto front", xlabel="bytes per image", xscale="log")
        axis.minorticks_off()
        sizes = sorted({int(x) for x, _ in points.values()})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    return _png(figure)


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> bytes:
    """A PNG of bars: for each objective, the importance of each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(importances), 2.6), layout="constrained")
    axes = figure.subplots(1, len(importances), squeeze=False)[0]
    for axis, (metric, shares) in zip(axes, importances.items(), strict=True):
        names = list(shares)[::-1]
        axis.barh(names, [shares[name] for name in names])
        axis.set(title=metric, xlim=(0, 1), xlabel="importance (fANOVA)")
    return _png(figure)


def _scatter(
    axis: Any,
    trials: Sequence[RecordedTrial],
    points: Mapping[str, tuple[float, float]],
    front: Sequence[RecordedTrial],
) -> None:
    starred = {trial.key for trial in front}
    series: dict[str, list[RecordedTrial]] = {}
    for trial in trials:
        others = {
            key: value for key, value in trial.settings.items() if key not in (SEED, LATENT_DIM)
        }
        series.setdefault(label(others) or "trials", []).append(trial)
    # Many continuous settings would give each trial a line of its own.
    if len(series) > 6:
        series = {"trials": list(trials)}
    for name, members in series.items():
        means: dict[float, list[float]] = {}
        for trial in members:
            if trial.state == FINISHED:
                means.setdefault(points[trial.key][0], []).append(points[trial.key][1])
        xs = sorted(means)
        (line,) = axis.plot(xs, [statistics.fmean(means[x]) for x in xs], alpha=0.6, label=name)
        for trial in members:
            on_front = trial.key in starred
            style = {"marker": "*", "s": 130} if on_front else {"marker": "o", "s": 22}
            hollow = trial.state != FINISHED
            colour = "none" if hollow else line.get_color()
            axis.scatter(
                *points[trial.key], facecolors=colour, edgecolors=line.get_color(), **style
            )
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=8)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
