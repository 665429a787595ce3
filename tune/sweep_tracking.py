"""A sweep in MLflow: one run for the sweep, and nested in it one run for each trial.

A trial's run holds its recipe, curves, figures and fingerprints.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fae.pipelines.chain import stage_pictures
from fae.pipelines.chain.stages import Stage, training_of
from fae.pipelines.config import Recipe
from fae.pipelines.config.facts import flatten
from fae.pipelines.storage import paths
from fae.pipelines.training.metrics_log import read_metrics_log
from fae.pipelines.training.tracking import Tracker, end_run, resolve_uri

from .records import FAILED, UNFINISHED
from .spaces import label
from .trials import Trial, sweep_folder


def sweep_tracker(recipe: Recipe) -> Tracker:
    """A tracker of the sweep's run."""
    params = flatten(recipe.tune.model_dump(mode="json", exclude_none=True))
    return Tracker(
        recipe.tracking,
        resolve_uri(recipe.tracking),
        sweep_folder(recipe),
        params,
        name=f"sweep {recipe.tune.name}",
        tags={"fae.kind": "sweep"},
    )


def trial_tracker(recipe: Recipe, trial: Trial) -> Tracker:
    """A tracker of the trial's run: its whole recipe as parameters, its settings in its name."""
    return Tracker(
        recipe.tracking,
        resolve_uri(recipe.tracking),
        trial.uri,
        flatten(trial.recipe.model_dump(mode="json", exclude={"tune"})),
        name=label(trial.settings),
        parent=sweep_folder(recipe),
        tags={
            "fae.kind": "trial",
            "fae.state": "running",
            "fae.data": str(trial.stages[0].parts.get("source", "")) if trial.stages else "",
        },
    )


def log_stage(tracker: Tracker, stage: Stage) -> None:
    """Log a finished stage's curves, metrics, figures and fingerprint to the trial's run."""
    result = stage.result()
    assert result is not None
    last = 0
    if training_of(stage):
        by_step: dict[int, dict[str, float]] = {}
        for name, series in read_metrics_log(stage.uri).items():
            for step, value in series:
                by_step.setdefault(step, {})[f"{stage.name}/{name}"] = value
        for step in sorted(by_step):
            tracker.log_metrics(by_step[step], step)
            last = step
    named = {f"{stage.name}/{name}": value for name, value in result["metrics"].items()}
    tracker.log_metrics(named, last)
    for name, png in stage_pictures(stage).items():
        tracker.log_figure(png, f"{stage.name}-{name}")
    tracker.set_tags({f"fae.{stage.name}": result["fingerprint"]})


def end_trainings(trial: Trial, others: Iterable[Trial]) -> None:
    """End the runs of the trial's unfinished trainings, which its own end has killed.

    One that a trial of `others` shares is left alone: that trial resumes it.
    """
    shared = {stage.uri for other in others for stage in other.stages}
    for stage in trial.stages:
        if training_of(stage) and stage.uri not in shared and stage.result() is None:
            end_run(stage.recipe.tracking, stage.uri, "KILLED")


def star_trials(
    recipe: Recipe, records: Mapping[str, Mapping[str, Any]], best: Collection[str]
) -> None:
    """Put a star before the names of the trials with the keys `best`, and before no others.

    `records` holds the records of the sweep's trials by key; unfinished and failed ones are left
    alone.
    """
    uri, folder = resolve_uri(recipe.tracking), sweep_folder(recipe)
    for key, record in records.items():
        if record["state"] in (UNFINISHED, FAILED):
            continue
        address = paths.join(folder, "trials", key)
        tracker = Tracker(recipe.tracking, uri, address, {}, parent=folder)
        tracker.rename(("★ " if key in best else "") + label(record["settings"]))
        tracker.set_tags({"fae.best": str(key in best).lower()})
        tracker.finish()
