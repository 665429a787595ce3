"""One trial of a sweep: settings, the stages of the chain that they mean, and its record in the sweep's folder.

STORAGE/tune/NAME/trials/KEY/ holds settings.json (written when the trial begins), recipe.yaml, and at the end result.json:
the sweep's source of truth. Plain JSON instead of Ray Tune's own experiment state, which is pickle, knows nothing of other
sweeps' stages, and forbids any change of the space; so a sweep can be restored, extended and read by anyone.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fae.pipelines.chain.stages import KEY_LENGTH, STAGES, Stage, needed_stages, plan_stages
from fae.pipelines.config import Recipe, RecipeError
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data import list_images
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.storage import fingerprint_of, paths
from fae.pipelines.training import run_folder
from fae.pipelines.training.metrics_log import read_metrics_log
from fae_core.errors import UserError

from .spaces import Settings, apply

STEP = "autoencoder/step"
FINISHED, STOPPED, BEGUN = "finished", "stopped early", "begun"


class SearchError(UserError, RuntimeError):
    """Trials failed; the message holds their first errors. The same command tries them again."""


@dataclass(frozen=True)
class Trial:
    """Settings and what they lead to; `uri` is the trial's folder."""

    settings: Settings
    recipe: Recipe
    stages: Sequence[Stage]
    uri: str

    def result(self) -> dict[str, Any] | None:
        """Its record: state, settings, metrics, stages by key, and which of them it ran itself; None while it runs."""
        return _read(self.uri)

    def metrics(self) -> dict[str, float]:
        """STAGE/NAME: value of all its stages that have finished, and of the training of a network that its settings name."""
        found: dict[str, Mapping[str, float]] = {
            stage.name: (stage.result() or {"metrics": {}})["metrics"] for stage in self.stages
        }
        for key, uri in self.settings.items():
            section, _, last = key.rpartition(".")
            if last == "checkpoint":
                trained = run_folder.result(str(uri).rpartition("/")[0])
                found[section.replace("_", "-")] = trained or {}
        return {
            f"{name}/{metric}": value
            for name, values in found.items()
            for metric, value in values.items()
        }

    def reports(self) -> list[dict[str, float]]:
        """Every validation of its autoencoder so far, as the trial reports it to Tune: `autoencoder/step` and metrics."""
        uris = [stage.uri for stage in self.stages if stage.name == "autoencoder"]
        by_step: dict[int, dict[str, float]] = {}
        for name, series in (item for uri in uris for item in read_metrics_log(uri).items()):
            if name.startswith("validation/"):
                for step, value in series:
                    named = f"autoencoder/{name.partition('/')[2]}"
                    by_step.setdefault(step, {})[named] = value
        return [{"autoencoder/step": step, **by_step[step]} for step in sorted(by_step)]

    def record(self, state: str, metrics: Mapping[str, float], ran: Mapping[str, float]) -> None:
        """Write result.json; `ran` holds the seconds of the stages that this trial itself ran."""
        result = {
            "state": state,
            "settings": self.settings,
            "metrics": dict(metrics),
            "stages": {stage.name: stage.key for stage in self.stages},
            "ran": dict(ran),
        }
        _write(self.uri, "result.json", json.dumps(result, indent=1))


def sweep_folder(recipe: Recipe) -> str:
    """STORAGE/tune/NAME. Raises RecipeError where the sweep has no usable name."""
    name = recipe.tune.name
    if not name or "/" in name or name.startswith("."):
        raise RecipeError(f"tune.name={name!r}: give the sweep a name; the same name goes on.")
    return paths.join(recipe.storage, "tune", name)


def plan_trial(recipe: Recipe, settings: Settings) -> Trial:
    """The trial of these settings; its key hashes its stages' keys, so settings that decide nothing make no new trial.

    It has the stages that the recipe's objectives, and chain.until, need. Raises RecipeError.
    """
    wanted = {_stage_of(objective.metric) for objective in recipe.tune.objectives}
    if recipe.chain.until:
        wanted.add(recipe.chain.until)
    made = apply(recipe, settings)
    made.chain.first = made.chain.until = None
    made.chain.probe = made.chain.probe or "probe" in wanted
    made.tracking.experiment = f"{recipe.tracking.experiment}-stages"
    planned = plan_stages(made, _listed(made.data.model_dump_json()))
    # A report is for one chain; the sweep has its own.
    stages = [stage for stage in needed_stages(planned, wanted) if stage.name != "report"]
    key = fingerprint_of({stage.name: stage.key for stage in stages} or settings)[:KEY_LENGTH]
    return Trial(settings, made, stages, paths.join(sweep_folder(recipe), "trials", key))


def begin(trial: Trial) -> bytes:
    """Leave the trial's settings and recipe in its folder; returns the recipe as YAML."""
    _write(trial.uri, "settings.json", json.dumps(trial.settings, indent=1))
    recipe = trial.recipe.model_copy(deep=True)
    recipe.tracking.experiment = recipe.tracking.experiment.removesuffix("-stages")
    written = recipe.to_yaml()
    _write(trial.uri, "recipe.yaml", written)
    return written.encode()


def recorded(folder: str) -> dict[str, dict[str, Any]]:
    """Every trial of the sweep by key: its result, or its settings with the state `begun`."""
    found: dict[str, dict[str, Any]] = {}
    for file in paths.list_files(paths.join(folder, "trials")):
        *_, key, name = file.uri.split("/")
        if name == "result.json":
            found[key] = json.loads(paths.read_bytes(file.uri))
        elif name == "settings.json" and key not in found:
            settings = json.loads(paths.read_bytes(file.uri))
            found[key] = {"state": BEGUN, "settings": settings, "metrics": {}}
    return dict(sorted(found.items()))


def failure_of(trial: Any) -> str:
    """Kind and last line of the error that ended a trial of Ray Tune."""
    error = trial.get_pickled_error() or trial.get_error()
    cause = getattr(error, "cause", None) or error
    last = str(cause).strip().splitlines()[-1:] or [""]
    return f"{type(cause).__name__}: {last[0]}"


def say(text: str) -> None:
    """One line of a sweep's progress."""
    print(text, file=sys.stderr, flush=True)


def _stage_of(metric: str) -> str:
    stage, _, name = metric.partition("/")
    if stage not in STAGES or stage == "report" or not name:
        raise RecipeError(
            f"tune.objectives: {metric!r} is no STAGE/NAME. Stages: {', '.join(STAGES[:-1])}; for example "
            "evaluation/frechet_backbone, probe/knn_latent, autoencoder/mse, latents/bytes_per_image."
        )
    return stage


@functools.cache
def _listed(data: str) -> list[ImageRecord]:
    """The images of a data section, listed once for all trials that share it."""
    return list_images(DataSection.model_validate_json(data))


def _read(uri: str) -> dict[str, Any] | None:
    result = paths.join(uri, "result.json")
    return dict(json.loads(paths.read_bytes(result))) if paths.exists(result) else None


def _write(uri: str, name: str, text: str) -> None:
    paths.write_bytes(paths.join(uri, name), text.encode())
