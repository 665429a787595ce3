"""How a sweep suggests settings and when it stops a trial early: Optuna and ASHA.

The recipe's `tune.algorithm` and `tune.scheduler` select them; sweep.py passes them to Ray Tune.
"""

from __future__ import annotations

from typing import Any

from fae.pipelines.config import Recipe, RecipeError

from . import study
from .records import FAILED, UNFINISHED, recorded
from .spaces import tune_space
from .trials import STEP


def make_scheduler(recipe: Recipe) -> Any:
    """Ray Tune's ASHA over steps of the autoencoder's training, None with tune.scheduler=none.

    Raises RecipeError where it could never stop a trial.
    """
    from ray.tune.schedulers import ASHAScheduler

    asha, steps = recipe.tune.asha, recipe.autoencoder.training.steps
    if recipe.tune.scheduler == "none":
        return None
    if asha.grace_steps > steps:
        raise RecipeError(
            f"tune.asha.grace_steps={asha.grace_steps} is more than "
            f"autoencoder.training.steps={steps}: ASHA would never stop a trial."
        )
    return ASHAScheduler(
        time_attr=STEP,
        metric=f"autoencoder/{asha.metric}",
        mode=asha.mode,
        max_t=steps,
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
        # A trial that completes this training continues with the next stage.
        stop_last_trials=False,
    )


def make_searcher(recipe: Recipe, folder: str) -> tuple[Any, int]:
    """(searcher, number of trials that it has yet to run) for tune.algorithm=optuna.

    Its study is made from the sweep's recorded trials, so nothing is unpickled. The settings of
    unfinished and failed trials come first. The recipe's points are no suggestions.
    """
    from optuna.storages import InMemoryStorage
    from ray.tune.search.optuna import OptunaSearch

    space = OptunaSearch.convert_search_space(tune_space(recipe.tune.space))
    objectives = recipe.tune.objectives
    records = {k: r for k, r in recorded(folder).items() if study.holds(space, r["settings"])}
    ended = {k: r for k, r in records.items() if r["state"] not in (UNFINISHED, FAILED)}
    known = {k: (r["settings"], r["metrics"]) for k, r in ended.items()}
    memory = InMemoryStorage()
    started = study.make_study(objectives, space, known, memory)
    to_resume = [r["settings"] for k, r in records.items() if k not in ended]
    for settings in to_resume:
        started.enqueue_trial(settings)
    searcher = OptunaSearch(
        space,
        metric=[objective.metric for objective in objectives],
        mode=[objective.mode for objective in objectives],
        storage=memory,
        study_name=study.NAME,
        # A restart continues the suggestions instead of repeating the first ones.
        seed=recipe.seed + len(ended),
    )
    suggested = [r for r in ended.values() if r["settings"] not in recipe.tune.points]
    return searcher, max(recipe.tune.num_samples - len(suggested), len(to_resume))
