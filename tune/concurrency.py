"""How many trials run at the same time, and how many CPU cores each of them has for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fae.pipelines.chain import training_resources
from fae.pipelines.chain.stages import training_of
from fae.pipelines.config import Recipe

from .trials import Trial


def concurrent_trials(
    recipe: Recipe, trial: Trial, cluster: Mapping[str, float], may_grow: bool = False
) -> int | None:
    """tune.max_concurrent_trials; without it, how many trials the `cluster` can train at once.

    `cluster` holds its CPUs and GPUs by Ray's names. The most demanding training of `trial`
    decides; the result is at least 1. It is None, not known, for a cluster that `may_grow` and has
    nothing yet of what a training needs: trials that wait make an autoscaler start nodes. Optuna
    runs one at a time there, because it learns from trials that have ended.
    """
    if recipe.tune.max_concurrent_trials:
        return recipe.tune.max_concurrent_trials
    fits = [
        cluster.get(name, 0.0) / value
        for stage in trial.stages
        if training_of(stage)
        for name, value in training_resources([stage]).items()
        if value
    ]
    if may_grow and 0.0 in fits and recipe.tune.algorithm != "optuna":
        return None
    return max(1, math.floor(min(fits, default=1.0)))


def cores_of_each(at_once: int | None, nodes: Sequence[float]) -> int | None:
    """The CPU cores that each of `at_once` trials has for itself, at most the largest node's.

    `nodes` holds the CPUs of each node. None where that is not known, or no CPU yet.
    """
    if at_once is None or not any(nodes):
        return None
    return max(1, min(int(max(nodes)), int(sum(nodes)) // at_once))


def cpus_of_nodes() -> list[float]:
    """The CPUs of each live node of the Ray cluster that this process is connected to."""
    import ray

    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def with_shared_cores(recipe: Recipe, cores: int | None) -> Recipe:
    """The recipe of a trial that has `cores` for itself; as it is where that is not known.

    Its CPU workers and actors together use no more threads than that, unless the recipe sets them.
    """
    if cores is None:
        return recipe
    shared = recipe.model_copy(deep=True)
    for section in (shared.autoencoder, shared.pixel_decoder, shared.generator):
        training = section.training
        training.threads_per_worker = training.threads_per_worker or max(
            1, cores // training.num_workers
        )
    shared.precompute.threads_per_actor = shared.precompute.threads_per_actor or max(
        1, cores // shared.precompute.num_actors
    )
    return shared
