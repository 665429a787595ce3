"""A sweep's recorded trials as an Optuna study, and what Optuna computes from it.

The search starts from such a study (algorithms.py). The report takes from it the Pareto front of
the objectives and the importance of each setting (sweep_report.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fae.pipelines.config.sections import ObjectiveSection

from .records import RecordedTrial
from .spaces import Settings

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage

NAME = "sweep"
FOREST_SEED = 0
"""Of fANOVA's random forest: the same trials always give the same report."""

Space = Mapping[str, "BaseDistribution"]


def make_study(
    objectives: Sequence[ObjectiveSection],
    space: Space,
    trials: Mapping[str, tuple[Settings, Mapping[str, float]]],
    storage: BaseStorage | None = None,
) -> Study:
    """A study, named `NAME`, of the `trials` (settings, metrics) by key.

    Trials that the space does not hold, or that lack a finite value of an objective, are left out.
    The user attribute `key` of a trial of the study is its key. Without `storage` the study is in
    memory.
    """
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
    directions = [direction[objective.mode] for objective in objectives]
    study = optuna.create_study(storage=storage, study_name=NAME, directions=directions)
    for key, (settings, metrics) in trials.items():
        if has_values(metrics, objectives) and holds(space, settings):
            trial = optuna.trial.create_trial(
                params=settings,
                distributions=dict(space),
                values=[metrics[objective.metric] for objective in objectives],
                user_attrs={"key": key},
            )
            study.add_trial(trial)
    return study


def has_values(metrics: Mapping[str, float], objectives: Sequence[ObjectiveSection]) -> bool:
    """Whether the metrics hold a finite value of every objective."""
    return all(math.isfinite(metrics.get(o.metric, math.nan)) for o in objectives)


def holds(space: Space, settings: Settings) -> bool:
    """Whether the settings have the space's keys, and values that it can suggest."""
    from optuna.trial import create_trial

    try:
        create_trial(params=settings, distributions=dict(space), values=[0.0])
    except ValueError:
        return False
    return True


def pareto_front(
    trials: Sequence[RecordedTrial], objectives: Sequence[ObjectiveSection]
) -> list[RecordedTrial]:
    """The trials that no other one dominates: as good in every objective and better in one."""
    space, parameters = _parameters(trials)
    added = {t.key: (values, t.metrics) for t, values in zip(trials, parameters, strict=True)}
    study = make_study(objectives, space, added)
    best = {trial.user_attrs["key"] for trial in study.best_trials}
    return [trial for trial in trials if trial.key in best]


def importance(trials: Sequence[RecordedTrial], metric: str) -> dict[str, float]:
    """Importance for the metric of each setting that varies, by fANOVA, the largest first.

    fANOVA (Hutter et al., ICML 2014) fits a random forest to the trials and takes the share of the
    forest's variance that a setting explains by itself, averaged over all values of the others.
    It suits a few tens of trials on a grid, of which Optuna's default, PED-ANOVA, looks at the
    best tenth only. The shares are divided by their sum, so they add up to 1. The result is empty
    where nothing varies: with fewer than two trials, equal settings, or equal values of the metric.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    space, parameters = _parameters(trials)
    values = np.array([trial.metrics[metric] for trial in trials])
    if not space or np.ptp(values) == 0.0:
        return {}
    # scikit-learn's trees do not split a node whose variance is below float64's resolution at 1.
    scaled = (values - values.mean()) / values.std()
    added = {
        trial.key: (settings, {metric: float(value)})
        for trial, settings, value in zip(trials, parameters, scaled, strict=True)
    }
    study = make_study([ObjectiveSection(metric=metric)], space, added)
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=FOREST_SEED))
    return {key: float(share) for key, share in shares.items()}


def _parameters(
    trials: Sequence[RecordedTrial],
) -> tuple[dict[str, BaseDistribution], list[Settings]]:
    """Each setting that varies as an Optuna parameter, and the parameters of each trial.

    A number becomes its rank among the values that were tried, so a logarithmic range counts
    evenly. Any other value, and a setting that a trial lacks (null), becomes a category: its JSON
    text.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    space: dict[str, BaseDistribution] = {}
    parameters: list[Settings] = [{} for _ in trials]
    for key in sorted({key for trial in trials for key in trial.settings}):
        values: list[Any] = [trial.settings.get(key) for trial in trials]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            values = [json.dumps(value, sort_keys=True) for value in values]
        levels = sorted(set(values))
        if len(levels) < 2:
            continue
        if isinstance(levels[0], str):
            space[key] = CategoricalDistribution(levels)
        else:
            space[key] = IntDistribution(0, len(levels) - 1)
            values = [levels.index(value) for value in values]
        for own, value in zip(parameters, values, strict=True):
            own[key] = value
    return space, parameters
