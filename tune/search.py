"""`fae tune`: a sweep of recipes by Ray Tune, each trial a walk through the chain's stages.

A stage that several trials share runs once: its folder is named by what decides it, and a claim (claims.py) lets one trial
at a time work there. Trials report every validation of their autoencoder, so ASHA stops one in the middle of its training;
trials.py says what they leave. The same command restores a sweep whose driver was killed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.integration.ray_train import TuneReportCallback

from fae.pipelines.chain import run_stage, training_resources
from fae.pipelines.chain.stages import check_images, needed_stages, plan_stages, training_of
from fae.pipelines.config import Recipe, RecipeError, with_absolute_paths
from fae.pipelines.runtime.session import quiet_logs, start_ray
from fae.pipelines.storage import paths
from fae.pipelines.training.tracking import Tracker, resolve_uri

from .algorithms import optuna_search, scheduler
from .report import write_sweep_report
from .spaces import Settings, label, planned_settings
from .stage_lock import stage_lock
from .sweep_tracking import log_stage, star_trials, sweep_tracker, trial_tracker
from .trials import (
    FINISHED,
    STEP,
    STOPPED,
    SearchError,
    Trial,
    begin,
    failure_of,
    plan_trial,
    recorded,
    say,
    sweep_folder,
)

SETTINGS = "settings"


def search(recipe: Recipe) -> dict[str, Any]:
    """Run the sweep's missing trials and write its report; returns that report's numbers.

    Raises RecipeError before anything runs, SearchError after the other trials have ended.
    """
    made = _with_places(recipe)
    folder, settings = sweep_folder(made), planned_settings(recipe)
    check_images(plan_trial(made, {}).stages)
    paths.write_bytes(paths.join(folder, "recipe.yaml"), recipe.to_yaml().encode())
    start_ray()
    _quiet_tune()
    tracker = sweep_tracker(made)
    made = with_shared_decoder(made)
    trials = {trial.uri: trial for trial in (plan_trial(made, values) for values in settings)}
    todo = [trial for trial in trials.values() if trial.result() is None]
    for trial in todo:
        check_images(trial.stages)
    suggested = made.tune.num_samples if made.tune.algorithm == "optuna" else 0
    say(f"{folder}: {len(trials)} trials, {len(trials) - len(todo)} of them finished already")
    if todo or suggested:
        _run(made, list(trials.values()), folder)
    return _report(recipe, made, tracker)


def with_shared_decoder(recipe: Recipe) -> Recipe:
    """The recipe with its pixel decoder trained and named, where no trial can change or finetune it.

    Its first stage knows no autoencoder, so one serves all trials, those of other seeds included.
    """
    varied = {key for point in recipe.tune.points for key in point} | recipe.tune.space.keys()
    sections = ("pixel_decoder", "data", "backbone", "image_size")
    if (
        recipe.chain.finetune
        or recipe.pixel_decoder.checkpoint
        or any(key.split(".")[0] in sections for key in varied)
        or "samples" not in {stage.name for stage in plan_trial(recipe, {}).stages}
    ):
        return recipe
    planned = plan_stages(plan_trial(recipe, {}).recipe)
    (stage,) = needed_stages(planned, {"pixel-decoder"})
    say(f"pixel decoder of all trials: {stage.uri}")
    run_stage(stage)
    made = recipe.model_copy(deep=True)
    made.pixel_decoder.checkpoint = paths.join(stage.uri, "pixel_decoder.safetensors")
    return made


def run_trial(config: dict[str, Any], values: dict[str, Any], cores: int) -> None:
    """What Ray Tune calls in a process of its own: the stages that are missing, each under its claim.

    They run with `cores` for themselves; the trial's own recipe, which is recorded, says nothing of this cluster.

    A trial that is recorded already only reports again what it reported then; ASHA is told so after a restart.
    """
    from ray import tune

    quiet_logs()
    recipe = Recipe.model_validate(values)
    trial = plan_trial(recipe, settings_of(config))
    found = trial.result()
    if found:
        for report in trial.reports():
            tune.report(report)
        tune.report(found["metrics"])
        return
    tracker = trial_tracker(recipe, trial)
    tracker.log_file(begin(trial), "recipe.yaml")
    ran: dict[str, float] = {}
    for stage in plan_trial(with_shared_cores(recipe, cores), trial.settings).stages:
        if stage.result() is None:
            with stage_lock(stage.uri):
                if stage.result() is None:
                    callbacks = [_ReportValidation()] if stage.name == "autoencoder" else []
                    ran[stage.name] = run_stage(stage, callbacks)["seconds"]
        if stage.name == "autoencoder" and stage.name not in ran:
            for report in trial.reports():
                tune.report(report)
        log_stage(tracker, stage)
    metrics = trial.metrics()
    trial.record(FINISHED, metrics, ran)
    tracker.set_tags({"fae.state": FINISHED})
    tracker.finish()
    tune.report(metrics)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings in a Tune trial's config: as planned here, or as Optuna suggested them."""
    return dict(json.loads(config[SETTINGS])) if SETTINGS in config else dict(config)


def concurrent_trials(recipe: Recipe, trial: Trial, cluster: Mapping[str, float]) -> int:
    """tune.max_concurrent_trials, or how many of the trial's most demanding stage the cluster's CPUs and GPUs hold."""
    if recipe.tune.max_concurrent_trials:
        return recipe.tune.max_concurrent_trials
    fits = [
        cluster.get(name, 0.0) / value
        for stage in trial.stages
        if training_of(stage)
        for name, value in training_resources([stage]).items()
        if value
    ]
    return max(1, math.floor(min(fits, default=1.0)))


def cores_of_each(at_once: int, nodes: Sequence[float]) -> int:
    """Of nodes with so many CPUs, what each of `at_once` trials has for itself: at most the largest node's."""
    return max(1, min(int(max(nodes)), int(sum(nodes)) // at_once))


def _cpus_of_nodes() -> list[float]:
    import ray

    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def with_shared_cores(recipe: Recipe, cores: int) -> Recipe:
    """The recipe of a trial that has `cores` for itself: its CPU workers and actors take no more threads than that."""
    made = recipe.model_copy(deep=True)
    for training in (
        section.training for section in (made.autoencoder, made.pixel_decoder, made.generator)
    ):
        training.threads_per_worker = training.threads_per_worker or max(
            1, cores // training.num_workers
        )
    made.precompute.threads_per_actor = made.precompute.threads_per_actor or max(
        1, cores // made.precompute.num_actors
    )
    return made


class _ReportValidation(TuneReportCallback):
    """Passes what the autoencoder's training reports on to Tune, named as the chain names it."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        first = {f"autoencoder/{name}": value for name, value in metrics[0].items()}
        if len(first) > 1:
            self._training_actor_item_queue.put(first)


class _Recorder(Callback):
    """In the driver: says how trials go, and records those that the scheduler stopped."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.errors: list[str] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(f"trial {label(settings_of(trial.config))}: started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if STEP in result:
            metric = f"autoencoder/{self.recipe.tune.asha.metric}"
            shown = f"{metric} {result.get(metric, math.nan):.4g}"
            say(f"trial {label(settings_of(trial.config))}: step {result[STEP]}  {shown}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        made = plan_trial(self.recipe, settings_of(trial.config))
        found = made.result()
        if found is None:
            reported = {
                name: float(value)
                for name, value in trial.last_result.items()
                if name.startswith("autoencoder/")
            }
            made.record(STOPPED, {**made.metrics(), **reported}, {})
            tracker = trial_tracker(self.recipe, made)
            for report in made.reports():
                step = int(report[STEP])
                tracker.log_metrics({k: v for k, v in report.items() if k != STEP}, step)
            tracker.set_tags({"fae.state": STOPPED})
            tracker.finish()
        state = found["state"] if found else STOPPED
        say(f"trial {label(settings_of(trial.config))}: {state}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.errors.append(f"{label(settings_of(trial.config))}: {failure_of(trial)}")
        say(f"trial {self.errors[-1]}")


def _run(recipe: Recipe, trials: list[Trial], folder: str) -> None:
    import ray
    from ray import tune

    judge = scheduler(recipe)
    todo = [trial for trial in trials if trial.result() is None]
    if judge is not None:
        # Those that have ended come first: the scheduler judges the others by them.
        todo = sorted(trials, key=lambda trial: trial.result() is None)
    limit = concurrent_trials(recipe, plan_trial(recipe, {}), ray.cluster_resources())
    say(f"{limit} at a time")
    recorder = _Recorder(recipe)
    options: dict[str, Any] = {"scheduler": judge, "max_concurrent_trials": limit}
    space: dict[str, Any] = {}
    if recipe.tune.algorithm == "optuna":
        searcher, missing = optuna_search(recipe, todo, folder)
        if not missing:
            return
        options |= {"search_alg": searcher, "num_samples": missing}
    else:
        space[SETTINGS] = tune.grid_search([json.dumps(trial.settings) for trial in todo])
    cores = cores_of_each(limit, _cpus_of_nodes())
    trainable = tune.with_parameters(run_trial, values=recipe.model_dump(mode="json"), cores=cores)
    with tempfile.TemporaryDirectory() as scratch:
        tuner = tune.Tuner(
            # A trial itself only waits; its stages ask for what they need.
            tune.with_resources(trainable, {"CPU": 0.01}),
            param_space=space,
            tune_config=tune.TuneConfig(**options),
            run_config=tune.RunConfig(
                name="tune", storage_path=scratch, callbacks=[recorder], verbose=0
            ),
        )
        tuner.fit()
    if recorder.errors:
        raise SearchError(
            f"{len(recorder.errors)} trials failed, the others are recorded:\n  "
            + "\n  ".join(recorder.errors)
            + "\nThe same command tries them again."
        )


def _quiet_tune() -> None:
    # A stopped trial lacks what later stages report; Tune would take that for a mistake.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Its newer printer announces itself at every verbosity; our listeners say what there is to say.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


def report(recipe: Recipe) -> dict[str, Any]:
    """Write the sweep's page again from its records, as it stands now; returns its numbers."""
    made = _with_places(recipe)
    if not recorded(sweep_folder(made)):
        raise RecipeError(f"{sweep_folder(made)} holds no trials yet: `fae tune` makes them.")
    return _report(recipe, made, sweep_tracker(made))


def _report(recipe: Recipe, made: Recipe, tracker: Tracker) -> dict[str, Any]:
    numbers = write_sweep_report(recipe, made, tracker)
    star_trials(made, recorded(sweep_folder(made)), numbers["best_trials"])
    tracker.finish()
    return numbers


def _with_places(recipe: Recipe) -> Recipe:
    """The recipe with absolute places: Ray's processes work in other folders."""
    made = with_absolute_paths(recipe)
    made.tracking.uri = resolve_uri(recipe.tracking)
    return made
