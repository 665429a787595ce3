"""`fae tune report`: one page about a sweep, made from its trials' records alone; also in its MLflow run.

Writes report.md, report.png, importance.png where something varies, and recommended.yaml, a recipe that `fae train` and
`fae run` take, into the sweep's folder. May be called at any time: it tells of the trials that are there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fae.pipelines.config import Recipe, RecipeError
from fae.pipelines.config.sections import ObjectiveSection
from fae.pipelines.storage import paths
from fae.pipelines.training.tracking import Tracker

from .report_figures import LATENT_DIM, PANELS, SEED, Row, draw, draw_importance
from .spaces import Settings, apply, label
from .trials import FINISHED, recorded, sweep_folder

NUM_BINS = 4


def write_sweep_report(
    recipe: Recipe, made: Recipe | None = None, tracker: Tracker | None = None
) -> dict[str, Any]:
    """Write the page; returns its numbers: trials, finished, Pareto front and the best settings.

    `made` is the recipe with absolute places. Raises RecipeError where the sweep has no trial.
    """
    folder = sweep_folder(made or recipe)
    rows = rows_of(recipe, recorded(folder))
    if not rows:
        raise RecipeError(f"{folder} holds no trials. `fae tune` with this recipe makes them.")
    objectives = recipe.tune.objectives
    finished = [row for row in rows if complete(row, objectives)]
    front = pareto_front(finished, objectives)
    best = best_settings(finished, objectives[0])
    importances = {o.metric: importance(finished, o.metric) for o in objectives}
    files: dict[str, bytes] = {"report.png": draw(rows, front, objectives)}
    if any(importances.values()):
        files["importance.png"] = draw_importance(importances)
    if best is not None:
        files["recommended.yaml"] = apply(recipe, best).to_yaml().encode()
    page = _page(recipe, rows, front, best, importances)
    files["report.md"] = page.encode()
    for name, data in files.items():
        paths.write_bytes(paths.join(folder, name), data)
    chosen = by_settings(finished).get(json.dumps(best, sort_keys=True), [])
    if tracker:
        _log(tracker, page, files, best)
        means = {
            o.metric: statistics.fmean([r.metrics[o.metric] for r in chosen])
            for o in objectives
            if chosen
        }
        tracker.log_metrics({f"best/{metric}": value for metric, value in means.items()}, 0)
    return {
        "report": paths.join(folder, "report.md"),
        "trials": len(rows),
        "finished": len(finished),
        "pareto": [row.settings for row in front],
        "best": best,
        "best_trials": [row.key for row in chosen],
    }


def rows_of(recipe: Recipe, records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The recorded trials in the order of their settings."""
    rows = []
    for key, record in records.items():
        settings = record["settings"]
        size = int(settings.get(LATENT_DIM, recipe.autoencoder.latent_dim))
        rows.append(Row(key, record["state"], settings, record["metrics"], size))
    return sorted(rows, key=lambda row: (row.latent_dim, json.dumps(row.settings, sort_keys=True)))


def complete(row: Row, objectives: Sequence[ObjectiveSection]) -> bool:
    """Whether the trial came to its end with every objective's number."""
    return row.state == FINISHED and all(o.metric in row.metrics for o in objectives)


def pareto_front(rows: Sequence[Row], objectives: Sequence[ObjectiveSection]) -> list[Row]:
    """The trials that no other one beats: as good in every objective and better in one."""
    signs = np.array([1.0 if o.mode == "min" else -1.0 for o in objectives])
    costs = [signs * np.array([row.metrics[o.metric] for o in objectives]) for row in rows]
    return [
        row
        for row, cost in zip(rows, costs, strict=True)
        if not any((other <= cost).all() and (other < cost).any() for other in costs)
    ]


def best_settings(rows: Sequence[Row], objective: ObjectiveSection) -> Settings | None:
    """The settings, seeds aside, with the best mean of the objective over their seeds."""
    groups = by_settings(rows)
    if not groups:
        return None
    sign = 1.0 if objective.mode == "min" else -1.0
    means = {
        key: sign * statistics.fmean(row.metrics[objective.metric] for row in group)
        for key, group in groups.items()
    }
    chosen = groups[min(means, key=lambda key: means[key])][0]
    return {key: value for key, value in chosen.settings.items() if key != SEED}


def by_settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Trials that differ in their seed alone, by their other settings as JSON."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others = {key: value for key, value in row.settings.items() if key != SEED}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(row)
    return groups


def importance(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Share of the metric's variance over the trials that each setting explains alone (correlation ratio η², in [0, 1]).

    Trials are grouped by the setting's value, numbers of more than four values by quartile; the variance of the group
    means, weighted by size, over the whole variance. Effects of settings together are not told apart.
    """
    # A trained network that a setting names is a result: each trial has its own.
    keys = sorted({k for row in rows for k in row.settings if not k.endswith(".checkpoint")})
    values = np.array([row.metrics[metric] for row in rows])
    total = float(values.var()) if len(values) else 0.0
    shares: dict[str, float] = {}
    for key in keys:
        groups = _groups([row.settings.get(key) for row in rows])
        if len(set(groups)) < 2 or total == 0.0:
            continue
        between = 0.0
        for group in set(groups):
            members = values[[g == group for g in groups]]
            between += len(members) * (float(members.mean()) - float(values.mean())) ** 2
        shares[key] = between / len(values) / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _page(
    recipe: Recipe,
    rows: Sequence[Row],
    front: Sequence[Row],
    best: Settings | None,
    importances: Mapping[str, Mapping[str, float]],
) -> str:
    objectives = recipe.tune.objectives
    finished = [row for row in rows if complete(row, objectives)]
    wanted = " and ".join(f"{o.metric} ({o.mode})" for o in objectives)
    states = {row.state for row in rows}
    counts = ", ".join(f"{sum(r.state == s for r in rows)} {s}" for s in sorted(states))
    lines = [f"# Sweep {recipe.tune.name}", "", f"{len(rows)} trials: {counts}. Wanted: {wanted}."]
    lines += ["", "## Recommended", ""]
    if best is None:
        lines += ["No trial has come to its end yet.", ""]
    else:
        group = by_settings(finished)[json.dumps(best, sort_keys=True)]
        numbers = ", ".join(
            f"{o.metric} {_mean([r.metrics[o.metric] for r in group])}" for o in objectives
        )
        trained = any(key.endswith(".checkpoint") for key in best)
        seeds = f"mean of {len(group)} trials" if len(group) > 1 else "one trial"
        lines += [
            f"**{label(best) or 'the recipe as it is'}**: {numbers} ({seeds}).",
            "",
            f"It has the best {objectives[0].metric}; `recommended.yaml` is the whole recipe:",
            "",
            # Training again with a population's last settings would not lead to its network.
            *([] if trained else ["    fae train autoencoder recommended.yaml run=best"]),
            "    fae run recommended.yaml",
            "",
        ]
    lines += ["## Trials", "", "![Latent size against what matters](report.png)", ""]
    lines += [
        "★ is the Pareto front of the objectives, a hollow mark a trial that was stopped early; lines are means over "
        "trials of equal settings.",
        "",
        *_table(rows, front, objectives),
        "",
    ]
    if any(importances.values()):
        lines += [
            "## What mattered",
            "",
            "![Importance](importance.png)",
            "",
            *_shares(importances),
            "",
        ]
        lines += [
            "A share is the variance of the means of the trials with equal value (numbers of many values: by quartile) "
            "over the whole variance, η², of the finished trials. It is a setting's effect alone; where `seed` is "
            "varied, its share shows how much is chance. Few trials make every share look large.",
            "",
        ]
    return "\n".join(lines)


def _table(
    rows: Sequence[Row], front: Sequence[Row], objectives: Sequence[ObjectiveSection]
) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    metrics = [o.metric for o in objectives]
    metrics += [m for m, _ in PANELS if m not in metrics and any(m in r.metrics for r in rows)]
    starred = {row.key for row in front}
    header = ["", *keys, *metrics, "state", "trial"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        values = [_number(row.metrics[m]) if m in row.metrics else "" for m in metrics]
        settings = [str(row.settings.get(key, "")) for key in keys]
        mark = "★" if row.key in starred else ""
        lines.append(
            "| " + " | ".join([mark, *settings, *values, row.state, f"`{row.key}`"]) + " |"
        )
    return lines


def _shares(importances: Mapping[str, Mapping[str, float]]) -> list[str]:
    keys = list(dict.fromkeys(key for shares in importances.values() for key in shares))
    lines = ["| setting | " + " | ".join(importances) + " |", "|---|" + "---:|" * len(importances)]
    for key in keys:
        values = [f"{shares[key]:.2f}" if key in shares else "" for shares in importances.values()]
        lines.append(f"| `{key}` | " + " | ".join(values) + " |")
    return lines


def _log(tracker: Tracker, page: str, files: Mapping[str, bytes], best: Settings | None) -> None:
    for name, data in files.items():
        if name.endswith(".png"):
            tracker.log_figure(data, name)
        else:
            tracker.log_file(data, name)
    text = "\n".join(line for line in page.splitlines() if not line.startswith("!["))
    tags = {"mlflow.note.content": text}
    if best is not None:
        tags["fae.best"] = label(best)
    tracker.set_tags(tags)


def _groups(values: Sequence[Any]) -> list[Any]:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(values)) > NUM_BINS:
        edges = np.quantile(numbers, np.linspace(0, 1, NUM_BINS + 1)[1:-1])
        return [int(group) for group in np.searchsorted(edges, numbers)]
    return [json.dumps(value) for value in values]


def _mean(values: Sequence[float]) -> str:
    text = _number(statistics.fmean(values))
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
