"""The page of a sweep's report, report.html: trials are points whose tips tell their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from fae.pipelines.config import Recipe
from fae.pipelines.pages import report_page
from fae.pipelines.pages.blocks import Chart, Commands, Section, Table, Words
from fae.pipelines.pages.charts import Point, line_chart

from .records import FINISHED, RecordedTrial
from .report_figures import BYTES, PANELS
from .spaces import label
from .trials import LATENT_DIM, SEED

MOST_SERIES = 4
"""Series of a chart; with more settings all trials are one."""


def sweep_page(
    recipe: Recipe,
    trials: Sequence[RecordedTrial],
    front: Sequence[RecordedTrial],
    recommended: Sequence[str],
    table: Table,
    importances: Mapping[str, Mapping[str, float]],
    importance_note: str,
) -> bytes:
    """The page; `recommended` are lines of words, then of commands, which are indented."""
    objectives = recipe.tune.objectives
    wanted = ", ".join(f"{o.metric} ({o.mode})" for o in objectives)
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    words = [line.replace("**", "").replace("`", "") for line in recommended]
    commands = [line.strip() for line in words if line.startswith("    ")]
    best: list[Words | Commands] = [
        Words(line) for line in words if line and not line.startswith("    ")
    ]
    if commands:
        best.append(Commands(commands))
    charts = Chart(
        _charts(trials, front, objectives[0].metric),
        "★ marks the Pareto front of the objectives, a hollow mark a trial that did not finish. "
        "Point at a mark for its settings.",
    )
    sections: list[Section] = [("Recommended", best), ("Trials", [charts, table])]
    if any(importances.values()):
        keys = list(dict.fromkeys(key for shares in importances.values() for key in shares))
        rows = [
            [key, *(f"{s[key]:.2f}" if key in s else "" for s in importances.values())]
            for key in keys
        ]
        shares = Table(["setting", *importances], rows)
        sections.append(("Importance", [shares, Words(importance_note)]))
    about = f"{len(trials)} trials: {counts}. Objectives: {wanted}."
    return report_page(f"Sweep {recipe.tune.name}", about, sections, "Made by fae tune.")


def _charts(
    trials: Sequence[RecordedTrial], front: Sequence[RecordedTrial], first: str
) -> list[Markup]:
    """A chart of each of PANELS that trials have, and the first objective by bytes per image."""
    drawings = []
    for metric, title in PANELS:
        known = [trial for trial in trials if metric in trial.metrics]
        if known:
            points = {t.key: (float(t.latent_dim), t.metrics[metric]) for t in known}
            drawings.append(_scatter(title, known, points, front, "latent channels"))
    known = [t for t in trials if BYTES in t.metrics and first in t.metrics]
    if known:
        points = {t.key: (t.metrics[BYTES], t.metrics[first]) for t in known}
        drawings.append(_scatter(first, known, points, front, "bytes per image"))
    return drawings


def _scatter(
    title: str,
    trials: Sequence[RecordedTrial],
    points: Mapping[str, tuple[float, float]],
    front: Sequence[RecordedTrial],
    x_label: str,
) -> Markup:
    starred = {trial.key for trial in front}
    series: dict[str, list[Point]] = {}
    for trial in sorted(trials, key=lambda trial: points[trial.key]):
        others = {k: v for k, v in trial.settings.items() if k not in (SEED, LATENT_DIM)}
        mark = "star" if trial.key in starred else "plain"
        if trial.state != FINISHED:
            mark = "hollow"
        tip = f"{label(trial.settings)}\n{trial.state}, trial {trial.key}"
        series.setdefault(label(others) or "trials", []).append(
            Point(*points[trial.key], tip, mark)
        )
    if len(series) > MOST_SERIES:
        series = {"trials": [point for group in series.values() for point in group]}
    return line_chart(title, series, x_label, logarithmic=(True, False), joined=False)
