"""`fae tune`: a sweep over recipes with Ray Tune. Each trial runs stages of the chain.

A stage that several trials share runs once: what decides its result names its folder, and a lock
(stage_lock.py) lets one trial at a time work there. Trials report every validation of their
autoencoder, so ASHA can stop a trial during that training. What a trial leaves is described in
trials.py; from it the same command resumes a sweep whose driver was killed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.integration.ray_train import TuneReportCallback

from fae.pipelines.chain import run_stage
from fae.pipelines.chain.stages import PLACES, check_stages, needed_stages, plan_stages
from fae.pipelines.config import Recipe, with_absolute_paths
from fae.pipelines.runtime.places import check_places
from fae.pipelines.runtime.session import on_cluster, plain_error, quiet_logs, start_ray
from fae.pipelines.storage import paths
from fae.pipelines.training.tracking import Tracker, resolve_uri, shared_tracking
from fae_core.errors import UserError

from .algorithms import make_scheduler, make_searcher
from .concurrency import concurrent_trials, cores_of_each, cpus_of_nodes, with_shared_cores
from .records import FAILED, FINISHED, STOPPED, recorded
from .spaces import Settings, label, planned_settings
from .stage_lock import stage_lock
from .sweep_report import write_sweep_report
from .sweep_tracking import end_trainings, log_stage, star_trials, sweep_tracker, trial_tracker
from .trials import STEP, Trial, plan_trial, recorded_trials, stage_of, sweep_folder

SETTINGS = "settings"
WAITING_TRIALS = 16
"""Trials at once where no node that trains is up yet.

A waiting trial is a process of 0.6 GB, and all of them may start on the first node.
"""


class SearchError(UserError, RuntimeError):
    """Trials failed; the message holds the error of each. The same command retries them."""


def search(recipe: Recipe) -> dict[str, Any]:
    """Run the sweep's missing trials and write its report; returns that report's numbers.

    Raises RecipeError before anything runs, SearchError after the other trials have ended.
    """
    resolved = _resolved(recipe)
    folder, settings = sweep_folder(resolved), planned_settings(recipe)
    check_places(resolved, PLACES)
    resolved.tracking = shared_tracking(recipe.tracking)
    _check_trials(resolved, settings)
    make_scheduler(resolved)
    paths.write_bytes(paths.join(folder, "recipe.yaml"), recipe.to_yaml().encode())
    start_ray()
    _quiet_tune()
    tracker = sweep_tracker(resolved)
    try:
        resolved = _run_missing(resolved, settings, folder)
    except Exception:
        tracker.finish("FAILED")
        raise
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    return _report(recipe, resolved, tracker)


def _run_missing(resolved: Recipe, settings: Sequence[Settings], folder: str) -> Recipe:
    """Run the trials that have not ended; returns the recipe with what all of them share."""
    resolved = with_shared_decoder(resolved)
    planned = {trial.uri: trial for trial in (plan_trial(resolved, one) for one in settings)}
    missing = [trial for trial in planned.values() if trial.result() is None]
    _say(f"{folder}: {len(planned)} trials are planned, {len(planned) - len(missing)} have ended.")
    if missing:
        _run_planned(resolved, list(planned.values()))
    if resolved.tune.algorithm == "optuna" and resolved.tune.space:
        _run_suggested(resolved, folder)
    return resolved


def _check_trials(recipe: Recipe, settings: Sequence[Settings]) -> None:
    """Raises RecipeError where images or settings cannot serve a stage of a planned trial.

    Where no trial is planned, because Optuna suggests all, the recipe itself is checked.
    """
    trials = [plan_trial(recipe, one) for one in settings or [{}]]
    stages = {stage.uri: stage for trial in trials if not trial.result() for stage in trial.stages}
    check_stages(list(stages.values()))


def report(recipe: Recipe) -> dict[str, Any]:
    """Write the sweep's report from the trials recorded so far; returns its numbers.

    Raises RecipeError where there are no trials.
    """
    resolved = _resolved(recipe)
    recorded_trials(recipe, sweep_folder(resolved))
    return _report(recipe, resolved, sweep_tracker(resolved))


def with_shared_decoder(recipe: Recipe) -> Recipe:
    """The recipe with its pixel decoder trained and named, where no trial changes or finetunes it.

    The decoder's first stage does not depend on the autoencoder, so one decoder serves all trials,
    also those with other seeds.
    """
    varied = {key for point in recipe.tune.points for key in point} | recipe.tune.space.keys()
    sections = ("pixel_decoder", "data", "backbone", "image_size")
    trial = plan_trial(recipe, {})
    if (
        recipe.chain.finetune
        or recipe.pixel_decoder.checkpoint
        or any(key.split(".")[0] in sections for key in varied)
        or any(stage_of(one.metric) == "pixel-decoder" for one in recipe.tune.objectives)
        or "samples" not in {stage.name for stage in trial.stages}
    ):
        return recipe
    (stage,) = needed_stages(plan_stages(trial.recipe), {"pixel-decoder"})
    _say(f"All trials share the pixel decoder {stage.uri}.")
    run_stage(stage)
    shared = recipe.model_copy(deep=True)
    shared.pixel_decoder.checkpoint = paths.join(stage.uri, "pixel_decoder.safetensors")
    return shared


def run_trial(config: dict[str, Any], values: dict[str, Any], cores: int | None) -> None:
    """Run a trial's missing stages, each under its lock; Ray Tune calls this in a process.

    `config` holds the trial's settings and `values` the sweep's recipe. The stages run with `cores`
    for themselves; the recipe that is recorded does not mention them. A trial that has ended
    already only repeats its reports, which tells ASHA of them after a restart.
    """
    from ray import tune

    quiet_logs()
    recipe = Recipe.model_validate(values)
    trial = plan_trial(recipe, settings_of(config))
    if result := trial.result():
        for validation in trial.validations():
            tune.report(validation)
        tune.report(result["metrics"])
        return
    tracker = trial_tracker(recipe, trial)
    tracker.log_file(trial.record_start(), "recipe.yaml")
    try:
        ran = _run_stages(recipe, trial, cores, tracker)
    except Exception as error:
        trial.record_failure(_cause(error))
        tracker.set_tags({"fae.state": FAILED})
        tracker.finish("FAILED")
        raise
    metrics = trial.metrics()
    trial.record_result(FINISHED, metrics, ran)
    tracker.set_tags({"fae.state": FINISHED})
    tracker.finish()
    tune.report(metrics)


def _run_stages(
    recipe: Recipe, trial: Trial, cores: int | None, tracker: Tracker
) -> dict[str, float]:
    """Run the missing stages; seconds of those that this trial itself ran, by stage."""
    from ray import tune

    ran: dict[str, float] = {}
    for stage in plan_trial(with_shared_cores(recipe, cores), trial.settings).stages:
        if stage.result() is None:
            with stage_lock(stage.uri):
                if stage.result() is None:
                    callbacks = [_ReportValidation()] if stage.name == "autoencoder" else []
                    ran[stage.name] = run_stage(stage, callbacks)["seconds"]
        if stage.name == "autoencoder" and stage.name not in ran:
            for validation in trial.validations():
                tune.report(validation)
        log_stage(tracker, stage)
    return ran


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings in the config of a Ray Tune trial, planned by the sweep or suggested."""
    return dict(json.loads(config[SETTINGS])) if SETTINGS in config else dict(config)


class _ReportValidation(TuneReportCallback):
    """Passes the reports of the autoencoder's training on to Ray Tune, under the chain's names."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        first = {f"autoencoder/{name}": value for name, value in metrics[0].items()}
        if len(first) > 1:
            self._training_actor_item_queue.put(first)


class _Recorder(Callback):
    """In the driver: prints the progress of trials and records those that the scheduler stopped."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.errors: list[str] = []
        self._plans: dict[str, Trial] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say(f"trial {label(settings_of(trial.config))}: started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if STEP in result:
            metric = f"autoencoder/{self.recipe.tune.asha.metric}"
            shown = f"{metric} {result.get(metric, math.nan):.4g}"
            _say(f"trial {label(settings_of(trial.config))}: step {result[STEP]}  {shown}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        planned = self._planned(trial)
        result = planned.result()
        if result is None:
            reported = {
                name: float(value)
                for name, value in trial.last_result.items()
                if name.startswith("autoencoder/")
            }
            planned.record_result(STOPPED, {**planned.metrics(), **reported}, {})
            tracker = trial_tracker(self.recipe, planned)
            for validation in planned.validations():
                step = int(validation[STEP])
                tracker.log_metrics({k: v for k, v in validation.items() if k != STEP}, step)
            tracker.set_tags({"fae.state": STOPPED})
            tracker.finish()
            end_trainings(planned, self._others(trials, trial))
        state = result["state"] if result else STOPPED
        _say(f"trial {label(settings_of(trial.config))}: {state}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        planned = self._planned(trial)
        cause = planned.failure()
        if cause is None:  # its process died, or could not start
            cause = _failure_of(trial)
            planned.record_failure(cause)
            tracker = trial_tracker(self.recipe, planned)
            tracker.set_tags({"fae.state": FAILED})
            tracker.finish("FAILED")
        end_trainings(planned, self._others(trials, trial))
        self.errors.append(f"{label(settings_of(trial.config))}: {cause}")
        _say(f"trial {self.errors[-1]}")

    def _others(self, trials: list[Any], trial: Any) -> list[Trial]:
        """The trials that have begun or will begin, and have not ended."""
        live = [one for one in trials if one is not trial and not one.is_finished()]
        return [self._planned(one) for one in live] if self.recipe.tracking.enabled else []

    def _planned(self, trial: Any) -> Trial:
        """Its plan, made once: that hashes the records of all images, and Ray Tune waits for it."""
        settings = settings_of(trial.config)
        key = json.dumps(settings, sort_keys=True)
        if key not in self._plans:
            self._plans[key] = plan_trial(self.recipe, settings)
        return self._plans[key]


def _run_planned(recipe: Recipe, planned: Sequence[Trial]) -> None:
    from ray import tune

    # Trials that have ended come first: the scheduler compares the others with them.
    ended = [] if recipe.tune.scheduler == "none" else [t for t in planned if t.result()]
    missing = [t for t in planned if t.result() is None]
    settings = [json.dumps(trial.settings) for trial in [*ended, *missing]]
    _run(recipe, {SETTINGS: tune.grid_search(settings)}, {})


def _run_suggested(recipe: Recipe, folder: str) -> None:
    searcher, num_samples = make_searcher(recipe, folder)
    if num_samples:
        _run(recipe, {}, {"search_alg": searcher, "num_samples": num_samples})


def _run(recipe: Recipe, space: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    import ray
    from ray import tune

    trial, there = plan_trial(recipe, {}), ray.cluster_resources()
    limit = concurrent_trials(recipe, trial, there, on_cluster())
    cores = cores_of_each(limit, cpus_of_nodes())
    _say(
        f"At most {limit} trials run at the same time."
        if limit
        else f"No node that trains is up yet: at most {WAITING_TRIALS} trials wait for nodes at "
        "once. tune.max_concurrent_trials=N sets how many."
    )
    recorder = _Recorder(recipe)
    trainable = tune.with_parameters(run_trial, values=recipe.model_dump(mode="json"), cores=cores)
    with tempfile.TemporaryDirectory() as scratch:
        tuner = tune.Tuner(
            # A trial itself only waits; its stages ask for what they need.
            tune.with_resources(trainable, {"CPU": 0.01}),
            param_space=dict(space),
            tune_config=tune.TuneConfig(
                scheduler=make_scheduler(recipe),
                max_concurrent_trials=limit or WAITING_TRIALS,
                **options,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=scratch, callbacks=[recorder], verbose=0
            ),
        )
        tuner.fit()
    if recorder.errors:
        raise SearchError(
            f"{len(recorder.errors)} trials failed, the others are recorded:\n  "
            + "\n  ".join(recorder.errors)
            + "\nRun the same command again: it retries them."
        )


def _failure_of(trial: Any) -> str:
    """The error with which Ray Tune ended a trial that recorded none itself."""
    error = trial.get_pickled_error() or trial.get_error()
    if error is None:
        return (
            "its process ended without an error. It may have been killed, for example for memory."
        )
    return _cause(getattr(error, "cause", None) or error)


def _cause(error: BaseException) -> str:
    """A user's error in its own words, of another one its kind and last line."""
    error = plain_error(error) if isinstance(error, Exception) else error
    if isinstance(error, UserError):
        return str(error)
    last = str(error).strip().splitlines()[-1:] or [""]
    return f"{type(error).__name__}: {last[0]}"


def _quiet_tune() -> None:
    # A stopped trial lacks the metrics of later stages, which Tune would report as an error.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Tune's newer output prints at every verbosity; `_Recorder` prints the progress instead.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


def _report(recipe: Recipe, resolved: Recipe, tracker: Tracker) -> dict[str, Any]:
    numbers = write_sweep_report(recipe, resolved, tracker)
    star_trials(resolved, recorded(sweep_folder(resolved)), numbers["best_trials"])
    tracker.finish()
    return numbers


def _resolved(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: Ray's processes work in other folders."""
    resolved = with_absolute_paths(recipe)
    resolved.tracking.uri = resolve_uri(recipe.tracking)
    return resolved


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
