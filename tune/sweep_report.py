"""The report of a sweep, made from its trials' records alone; `fae tune report` writes it again.

It consists of report.html for people, of report.md, report.png and, where a setting varies,
importance.png for MLflow, and of recommended.yaml, a recipe that `fae train` and `fae run` take.
All of them are written into the sweep's folder and logged to its MLflow run. The report can be made
at any time, from the trials that exist by then.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fae.pipelines.config import Recipe
from fae.pipelines.config.sections import ObjectiveSection
from fae.pipelines.pages.blocks import Table
from fae.pipelines.storage import paths
from fae.pipelines.training.tracking import Tracker

from .records import FINISHED, RecordedTrial
from .report_figures import PANELS, importance_figure, trials_figure
from .report_page import sweep_page
from .spaces import Settings, apply, label
from .study import has_values, importance, pareto_front
from .trials import SEED, recorded_trials, sweep_folder

IMPORTANCE_NOTE = (
    "The numbers are fANOVA's importance of a setting for an objective, computed by Optuna from "
    "the finished trials: the share of the objective's variance that the setting explains by "
    "itself. A column is scaled to add up to 1, so effects of settings together do not show. "
    "Where `seed` is varied at all other settings, its importance shows how much is chance; where "
    "it is varied at some of them only, it also takes a part of theirs. With few trials every "
    "number is uncertain."
)


def write_sweep_report(
    recipe: Recipe, resolved: Recipe | None = None, tracker: Tracker | None = None
) -> dict[str, Any]:
    """Write the report; returns its numbers: trials, finished, Pareto front, the best settings.

    `resolved` is the recipe with absolute paths. Raises RecipeError where the sweep has no trials.
    """
    folder = sweep_folder(resolved or recipe)
    trials = recorded_trials(recipe, folder)
    objectives = recipe.tune.objectives
    finished = [trial for trial in trials if complete(trial, objectives)]
    front = pareto_front(finished, objectives)
    best = best_settings(finished, objectives[0])
    importances = {o.metric: importance(finished, o.metric) for o in objectives}
    files: dict[str, bytes] = {"report.png": trials_figure(trials, front, objectives)}
    if any(importances.values()):
        files["importance.png"] = importance_figure(importances)
    if best is not None:
        files["recommended.yaml"] = apply(recipe, best).to_yaml().encode()
    text = _markdown(recipe, trials, front, best, importances)
    files["report.md"] = text.encode()
    files["report.html"] = sweep_page(
        recipe,
        trials,
        front,
        _recommendation(recipe, trials, best),
        _trials_table(trials, front, objectives),
        importances,
        IMPORTANCE_NOTE,
    )
    for name, data in files.items():
        paths.write_bytes(paths.join(folder, name), data)
    chosen = by_settings(finished).get(json.dumps(best, sort_keys=True), [])
    if tracker:
        _log(tracker, text, files, best)
        means = {
            o.metric: statistics.fmean([trial.metrics[o.metric] for trial in chosen])
            for o in objectives
            if chosen
        }
        tracker.log_metrics({f"best/{metric}": value for metric, value in means.items()}, 0)
    return {
        "report": paths.join(folder, "report.html"),
        "trials": len(trials),
        "finished": len(finished),
        "pareto": [trial.settings for trial in front],
        "best": best,
        "best_trials": [trial.key for trial in chosen],
    }


def complete(trial: RecordedTrial, objectives: Sequence[ObjectiveSection]) -> bool:
    """Whether the trial finished with a finite value of every objective."""
    return trial.state == FINISHED and has_values(trial.metrics, objectives)


def best_settings(trials: Sequence[RecordedTrial], objective: ObjectiveSection) -> Settings | None:
    """The settings without the seed whose mean of the objective over their seeds is the best."""
    groups = by_settings(trials)
    if not groups:
        return None
    sign = 1.0 if objective.mode == "min" else -1.0
    means = {
        key: sign * statistics.fmean(trial.metrics[objective.metric] for trial in group)
        for key, group in groups.items()
    }
    chosen = groups[min(means, key=lambda key: means[key])][0]
    return {key: value for key, value in chosen.settings.items() if key != SEED}


def by_settings(trials: Sequence[RecordedTrial]) -> dict[str, list[RecordedTrial]]:
    """Trials that differ in their seed alone, by their other settings as JSON."""
    groups: dict[str, list[RecordedTrial]] = {}
    for trial in trials:
        others = {key: value for key, value in trial.settings.items() if key != SEED}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(trial)
    return groups


def _markdown(
    recipe: Recipe,
    trials: Sequence[RecordedTrial],
    front: Sequence[RecordedTrial],
    best: Settings | None,
    importances: Mapping[str, Mapping[str, float]],
) -> str:
    objectives = recipe.tune.objectives
    wanted = ", ".join(f"{o.metric} ({o.mode})" for o in objectives)
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    lines = [
        f"# Sweep {recipe.tune.name}",
        "",
        f"{len(trials)} trials: {counts}. Objectives: {wanted}.",
        "",
        "## Recommended",
        "",
        *_recommendation(recipe, trials, best),
        "",
        "## Trials",
        "",
        "![Metrics by latent size](report.png)",
        "",
        "★ marks the Pareto front of the objectives, a hollow mark a trial that did not finish. "
        "Lines join the means of trials with equal settings.",
        "",
        *_markdown_table(_trials_table(trials, front, objectives)),
        "",
    ]
    if any(importances.values()):
        lines += ["## Importance", "", "![Importance of the settings](importance.png)", ""]
        lines += [*_importance_table(importances), "", IMPORTANCE_NOTE, ""]
    return "\n".join(lines)


def _recommendation(
    recipe: Recipe, trials: Sequence[RecordedTrial], best: Settings | None
) -> list[str]:
    objectives = recipe.tune.objectives
    if best is None:
        return ["No trial has finished yet."]
    finished = [trial for trial in trials if complete(trial, objectives)]
    group = by_settings(finished)[json.dumps(best, sort_keys=True)]
    numbers = ", ".join(
        f"{o.metric} {_mean([trial.metrics[o.metric] for trial in group])}" for o in objectives
    )
    seeds = f"mean of {len(group)} trials" if len(group) > 1 else "one trial"
    lines = [
        f"**{label(best) or 'the recipe as it is'}**: {numbers} ({seeds}).",
        "",
        f"These settings have the best {objectives[0].metric}. `recommended.yaml` is the recipe:",
        "",
    ]
    if apply(recipe, best).autoencoder.checkpoint is None:
        lines.append("    fae train autoencoder recommended.yaml run=best")
    return [*lines, "    fae run recommended.yaml"]


def _trials_table(
    trials: Sequence[RecordedTrial],
    front: Sequence[RecordedTrial],
    objectives: Sequence[ObjectiveSection],
) -> Table:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    metrics = [o.metric for o in objectives]
    known = {metric for trial in trials for metric in trial.metrics}
    metrics += [metric for metric, _ in PANELS if metric in known - set(metrics)]
    starred = {trial.key for trial in front}
    rows = []
    for trial in trials:
        cells = ["★" if trial.key in starred else ""]
        cells += [str(trial.settings.get(key, "")) for key in keys]
        cells += [_number(trial.metrics[m]) if m in trial.metrics else "" for m in metrics]
        rows.append([*cells, trial.state, trial.key])
    marked = [index for index, trial in enumerate(trials) if trial.key in starred]
    return Table(["", *keys, *metrics, "state", "trial"], rows, marked)


def _markdown_table(table: Table) -> list[str]:
    lines = _header(table.header, "---")
    return [*lines, *(_line([*row[:-1], f"`{row[-1]}`"]) for row in table.rows)]


def _importance_table(importances: Mapping[str, Mapping[str, float]]) -> list[str]:
    keys = dict.fromkeys(key for shares in importances.values() for key in shares)
    lines = _header(["setting", *importances], "---:")
    for key in keys:
        cells = [f"{shares[key]:.2f}" if key in shares else "" for shares in importances.values()]
        lines.append(_line([f"`{key}`", *cells]))
    return lines


def _header(names: Sequence[str], rule: str) -> list[str]:
    return [_line(names), "|---|" + f"{rule}|" * (len(names) - 1)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _log(tracker: Tracker, text: str, files: Mapping[str, bytes], best: Settings | None) -> None:
    for name, data in files.items():
        if name.endswith(".png"):
            tracker.log_figure(data, name)
        else:
            tracker.log_file(data, name)
    note = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    tags = {"mlflow.note.content": note}
    if best is not None:
        tags["fae.best"] = label(best)
    tracker.set_tags(tags)


def _mean(values: Sequence[float]) -> str:
    text = _number(statistics.fmean(values))
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
