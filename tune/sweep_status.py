"""How far a sweep is, from its folder alone: `fae status STORAGE/tune/NAME`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

from fae.pipelines.config import Recipe, RecipeError, load_recipe
from fae.pipelines.config.sections import StageName
from fae.pipelines.status import status_of
from fae.pipelines.status.account import (
    BEGUN,
    FINISHED,
    RUNNING,
    Status,
    live_state,
    recent_rate,
    silence,
    time_left,
)
from fae.pipelines.storage import paths

from . import records
from .spaces import label, planned_settings


def status_of_sweep(uri: str) -> Status | None:
    """The sweep in the folder `uri`, None where it holds none.

    Its parts are the stages in the storage that write at present, which other jobs may have begun.
    """
    *_, above, name = ["", *uri.rstrip("/").split("/")]
    recipe_uri = paths.join(uri, "recipe.yaml")
    if above != "tune" or not paths.exists(recipe_uri):
        return None
    storage = uri.rstrip("/").removesuffix(f"tune/{name}") or "."
    recipe = _recipe(recipe_uri)
    trials = records.recorded(uri)
    states = [trial["state"] for trial in trials.values()]
    files = list(paths.list_files(paths.join(uri, "trials")))
    times = [file.modified for file in files if file.modified is not None]
    ends = [
        file.modified
        for file in files
        if file.uri.endswith("/result.json") and file.modified is not None
    ]
    done = sum(state in (records.FINISHED, records.STOPPED) for state in states)
    total = planned_trials(recipe) if recipe else None
    finished = total is not None and done >= total
    rate, usual = (None, None) if finished else recent_rate(ends)
    parts = [] if finished else _stages_at_work(storage)
    silent = silence(times)
    at_work = any(part.state == RUNNING for part in parts)
    notes = [f"{states.count(state)} {state}" for state in sorted(set(states))]
    if not finished and rate is None:
        notes.append("no rate yet: it takes two trials that have ended")
    if recipe is not None:
        notes += _best(recipe, trials)
    state = FINISHED if finished else RUNNING if at_work else live_state(silent, usual)
    return Status(
        "sweep",
        uri,
        state if trials else BEGUN,
        unit="trials",
        done=done,
        total=total,
        rate=rate,
        seconds_left=None if finished else time_left(done, total, rate),
        silent_seconds=silent,
        errors=states.count(records.FAILED),
        notes=notes,
        parts=parts,
    )


def planned_trials(recipe: Recipe) -> int:
    """Trials that the sweep runs in all, where none has the result of another."""
    suggested = recipe.tune.algorithm == "optuna" and recipe.tune.space
    return len(planned_settings(recipe)) + (recipe.tune.num_samples if suggested else 0)


def _recipe(uri: str) -> Recipe | None:
    """The sweep's recipe, None where another version wrote keys that this one does not know."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(paths.read_bytes(uri))
        try:
            return load_recipe(str(path))
        except RecipeError:
            return None


def _stages_at_work(storage: str) -> list[Status]:
    names = [
        name
        for name in paths.list_folders(storage)
        if name.rpartition("-")[0] in get_args(StageName)
    ]
    found = []
    for name in names:
        folder = paths.join(storage, name)
        if not paths.exists(paths.join(folder, "stage.json")):
            part = status_of(folder)
            if part.state == RUNNING:
                found.append(part)
    return found


def _best(recipe: Recipe, trials: dict[str, dict[str, object]]) -> list[str]:
    """A line about the trial with the best value of the first objective."""
    objective = recipe.tune.objectives[0]
    sign = 1.0 if objective.mode == "min" else -1.0
    values = []
    for trial in trials.values():
        metrics, settings = trial["metrics"], trial["settings"]
        assert isinstance(metrics, dict) and isinstance(settings, dict)
        if trial["state"] == records.FINISHED and objective.metric in metrics:
            value = float(metrics[objective.metric])
            values.append((sign * value, value, label(settings)))
    if not values:
        return []
    _, value, settings_text = min(values)
    return [f"best so far: {objective.metric} {value:.4g} with {settings_text or 'the recipe'}"]
