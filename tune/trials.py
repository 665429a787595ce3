"""One trial of a sweep: its settings, the chain's stages that they lead to, and its record.

STORAGE/tune/NAME/trials/KEY/ holds settings.json and recipe.yaml, written when the trial starts,
and at the end result.json, or failure.json after an error. These files are the sweep's only state.
They are plain JSON and YAML, which anyone can read. Ray Tune's own experiment state is pickled,
knows nothing of stages that another sweep has run, and does not allow a change of the space.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fae.pipelines.chain.stages import KEY_LENGTH, STAGES, Stage, needed_stages, plan_stages
from fae.pipelines.config import Recipe, RecipeError
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data import list_images
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.storage import fingerprint_of, paths
from fae.pipelines.training.metrics_log import read_metrics_log

from .records import FAILED, RecordedTrial, recorded
from .spaces import Settings, apply

STEP = "autoencoder/step"
LATENT_DIM, SEED = "autoencoder.latent_dim", "seed"
"""Settings that the report tells from the others."""


@dataclass(frozen=True)
class Trial:
    """A trial as it is planned; `uri` is its folder."""

    settings: Settings
    recipe: Recipe
    stages: Sequence[Stage]
    uri: str

    def result(self) -> dict[str, Any] | None:
        """What `record_result` wrote, None where the trial is unfinished."""
        return _read(self.uri)

    def metrics(self) -> dict[str, float]:
        """The metrics of its finished stages, named STAGE/NAME."""
        return {
            f"{stage.name}/{name}": value
            for stage in self.stages
            for name, value in (stage.result() or {"metrics": {}})["metrics"].items()
        }

    def validations(self) -> list[dict[str, float]]:
        """Every validation of its autoencoder so far, as the trial reports it to Ray Tune.

        Each holds `autoencoder/step` and the metrics `autoencoder/NAME`; they are in order of step.
        """
        uris = [stage.uri for stage in self.stages if stage.name == "autoencoder"]
        by_step: dict[int, dict[str, float]] = {}
        for name, series in (item for uri in uris for item in read_metrics_log(uri).items()):
            if name.startswith("validation/"):
                for step, value in series:
                    named = f"autoencoder/{name.partition('/')[2]}"
                    by_step.setdefault(step, {})[named] = value
        return [{STEP: step, **by_step[step]} for step in sorted(by_step)]

    def record_failure(self, cause: str) -> None:
        """Write failure.json with the error that ended the trial; its next start deletes it."""
        failure = {"state": FAILED, "settings": self.settings, "metrics": self.metrics()}
        _write(self.uri, "failure.json", json.dumps({**failure, "cause": cause}, indent=1))

    def failure(self) -> str | None:
        """The error that ended the trial, None where none did."""
        uri = paths.join(self.uri, "failure.json")
        return str(json.loads(paths.read_bytes(uri))["cause"]) if paths.exists(uri) else None

    def record_start(self) -> bytes:
        """Write settings.json and recipe.yaml; returns the recipe as YAML."""
        paths.delete(paths.join(self.uri, "failure.json"))
        _write(self.uri, "settings.json", json.dumps(self.settings, indent=1))
        recipe = self.recipe.model_copy(deep=True)
        recipe.tracking.experiment = recipe.tracking.experiment.removesuffix("-stages")
        written = recipe.to_yaml()
        _write(self.uri, "recipe.yaml", written)
        return written.encode()

    def record_result(
        self, state: str, metrics: Mapping[str, float], ran: Mapping[str, float]
    ) -> None:
        """Write result.json; `ran` holds the seconds of each stage that this trial itself ran."""
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
        raise RecipeError(
            f"tune.name={name!r}: give the sweep a name without slashes, tune.name=NAME. "
            "The same name resumes it."
        )
    return paths.join(recipe.storage, "tune", name)


def plan_trial(recipe: Recipe, settings: Settings) -> Trial:
    """The trial of these settings, with the stages that the objectives and chain.until need.

    Its key hashes its stages' keys, so settings that decide nothing make no new trial. Raises
    RecipeError.
    """
    wanted = {stage_of(objective.metric) for objective in recipe.tune.objectives}
    varied = apply(recipe, settings)
    varied.chain.first = varied.chain.until = None
    varied.chain.probe = varied.chain.probe or "probe" in wanted
    varied.tracking.experiment = f"{recipe.tracking.experiment}-stages"
    planned = plan_stages(varied, _listed(varied.data.model_dump_json()))
    if absent := sorted(wanted - {stage.name for stage in planned}):
        raise RecipeError(
            f"tune.objectives: the chain of this recipe has no stage {absent[0]!r}. A network that "
            "the recipe names is not trained, and finetune needs chain.finetune=true."
        )
    if recipe.chain.until:
        wanted.add(recipe.chain.until)
    # The chain's report describes one chain. The sweep has a report of its own.
    stages = [stage for stage in needed_stages(planned, wanted) if stage.name != "report"]
    key = fingerprint_of({stage.name: stage.key for stage in stages})[:KEY_LENGTH]
    return Trial(settings, varied, stages, paths.join(sweep_folder(recipe), "trials", key))


def recorded_trials(recipe: Recipe, folder: str) -> list[RecordedTrial]:
    """The sweep's trials in order of latent size and settings. Raises RecipeError without any."""
    trials = []
    for key, record in recorded(folder).items():
        settings = record["settings"]
        size = int(settings.get(LATENT_DIM, recipe.autoencoder.latent_dim))
        trials.append(RecordedTrial(key, record["state"], settings, record["metrics"], size))
    if not trials:
        raise RecipeError(f"{folder} holds no trials yet. `fae tune` with this recipe runs them.")
    return sorted(trials, key=lambda t: (t.latent_dim, json.dumps(t.settings, sort_keys=True)))


def stage_of(metric: str) -> str:
    """The stage in an objective's STAGE/NAME. Raises RecipeError where there is none."""
    stage, _, name = metric.partition("/")
    if stage not in STAGES or stage == "report" or not name:
        raise RecipeError(
            f"tune.objectives: {metric!r} is no STAGE/NAME. Stages: {', '.join(STAGES[:-1])}; for "
            "example evaluation/frechet_backbone, probe/knn_latent, autoencoder/mse, "
            "latents/bytes_per_image."
        )
    return stage


@functools.cache
def _listed(data: str) -> list[ImageRecord]:
    """The images of a data section in JSON, listed once for all trials that share it."""
    return list_images(DataSection.model_validate_json(data))


def _read(uri: str) -> dict[str, Any] | None:
    result = paths.join(uri, "result.json")
    return dict(json.loads(paths.read_bytes(result))) if paths.exists(result) else None


def _write(uri: str, name: str, text: str) -> None:
    paths.write_bytes(paths.join(uri, name), text.encode())
