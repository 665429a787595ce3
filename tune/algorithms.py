"""How a sweep looks for settings and when it gives a trial up: Optuna's suggestions and ASHA's rungs, as the recipe sets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fae.pipelines.config import Recipe, RecipeError

from .spaces import tune_space
from .trials import FINISHED, STEP, STOPPED, Trial, recorded


def scheduler(recipe: Recipe) -> Any:
    """Ray Tune's ASHA over steps of the autoencoder's training, None without one. Raises RecipeError."""
    from ray.tune.schedulers import ASHAScheduler

    asha, steps = recipe.tune.asha, recipe.autoencoder.training.steps
    if recipe.tune.scheduler == "none":
        return None
    if asha.grace_steps > steps:
        raise RecipeError(
            f"tune.asha.grace_steps={asha.grace_steps} is more than autoencoder.training.steps={steps}: nothing would "
            "ever be stopped."
        )
    return ASHAScheduler(
        time_attr=STEP,
        metric=f"autoencoder/{asha.metric}",
        mode=asha.mode,
        max_t=steps,
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
        # Who has come to the end of this training goes on to the next stage.
        stop_last_trials=False,
    )


def optuna_search(recipe: Recipe, todo: Sequence[Trial], folder: str) -> tuple[Any, int]:
    """(searcher, trials that it has yet to run): its study is made anew from the recorded trials, so nothing is unpickled."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [objective.metric for objective in recipe.tune.objectives]
    modes: list[str] = [objective.mode for objective in recipe.tune.objectives]
    space = OptunaSearch.convert_search_space(tune_space(recipe.tune.space))
    memory = optuna.storages.InMemoryStorage()
    directions: Any = ["minimize" if mode == "min" else "maximize" for mode in modes]
    study = optuna.create_study(storage=memory, study_name="sweep", directions=directions)
    counted = 0
    waiting = [trial.settings for trial in todo]
    for record in recorded(folder).values():
        settings = record["settings"]
        if settings.keys() != space.keys():
            continue
        if record["state"] in (FINISHED, STOPPED):
            counted += 1
        else:
            waiting.append(settings)
        values = [record["metrics"].get(name) for name in names]
        if None not in values:
            study.add_trial(
                optuna.trial.create_trial(params=settings, distributions=space, values=values)
            )
    for settings in waiting:
        study.enqueue_trial(settings)
    missing = max(recipe.tune.num_samples - counted, len(waiting))
    searcher = OptunaSearch(
        space,
        metric=names,
        mode=modes,
        storage=memory,
        study_name="sweep",
        # Each restart draws on from where it is instead of drawing the same again.
        seed=recipe.seed + counted,
    )
    return searcher, missing
