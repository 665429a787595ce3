"""What a sweep tries: the settings that a recipe's `tune.space` and `tune.points` mean, and the recipe of each.

Settings are a mapping of dotted recipe keys to values. Every one is validated by the recipe itself before anything runs, so
a mistyped key or a value that is not allowed stops at once with the nearest spelling.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fae.pipelines.config import Recipe, RecipeError, validate_recipe
from fae.pipelines.config.sections import SpaceSection, TuneSection

Settings = dict[str, Any]


def apply(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with the settings in it and without its sweep. Raises RecipeError that names the key."""
    values = recipe.model_dump(mode="json", exclude={"tune"})
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"tune: {key!r} leads through {section!r}, which is no section.")
            place = inner
        place[last] = value
    if "tune" in values:
        raise RecipeError("tune: a sweep cannot vary its own section.")
    return validate_recipe(values, source=f"tune: {label(settings)}")


def label(settings: Mapping[str, Any]) -> str:
    """A short name for people: the last parts of the keys, and as much before as tells them apart."""
    return "  ".join(f"{_short(key, settings)}={_text(value)}" for key, value in settings.items())


def planned_settings(recipe: Recipe) -> list[Settings]:
    """All settings of a grid or of random draws, then the recipe's points, each once, all valid.

    For Optuna the points alone: it suggests the others one by one. Raises RecipeError.
    """
    tune = recipe.tune
    check(recipe)
    if tune.algorithm == "grid":
        drawn = _grid(tune)
    elif tune.algorithm == "random":
        random = np.random.default_rng(recipe.seed)
        drawn = [_draw(tune.space, random) for _ in range(tune.num_samples)]
    else:
        drawn = []
    unique = {json.dumps(settings, sort_keys=True): settings for settings in [*drawn, *tune.points]}
    for settings in unique.values():
        apply(recipe, settings)
    return list(unique.values())


def check(recipe: Recipe) -> None:
    """Raises RecipeError where the space is empty, does not suit the algorithm, or holds a value that is not allowed."""
    tune = recipe.tune
    if not tune.space and not tune.points:
        raise RecipeError(
            "tune.space is empty: name recipe keys and their values, for example "
            "tune.space.autoencoder.latent_dim.grid=[16,32]."
        )
    for key, space in tune.space.items():
        if tune.algorithm == "grid" and space.grid is None:
            raise RecipeError(
                f"tune.space.{key}: algorithm grid tries listed values, so it needs `grid`; "
                "`choice`, `uniform` and `loguniform` are for tune.algorithm=random or optuna."
            )
        for value in extremes(space):
            apply(recipe, {key: value})


def extremes(space: SpaceSection) -> Sequence[Any]:
    """All listed values, or both ends of an interval."""
    return space.grid or space.choice or space.uniform or space.loguniform or ()


def tune_space(space: Mapping[str, SpaceSection]) -> dict[str, Any]:
    """The space in Ray Tune's own words, for a searcher that suggests from it."""
    from ray import tune

    made: dict[str, Any] = {}
    for key, section in space.items():
        if section.uniform:
            made[key] = tune.uniform(*section.uniform)
        elif section.loguniform:
            made[key] = tune.loguniform(*section.loguniform)
        else:
            made[key] = tune.choice(list(extremes(section)))
    return made


def _grid(tune: TuneSection) -> list[Settings]:
    if not tune.space:
        return []
    axes = [[(key, value) for value in space.grid or ()] for key, space in tune.space.items()]
    return [dict(values) for values in itertools.product(*axes)]


def _draw(space: Mapping[str, SpaceSection], random: np.random.Generator) -> Settings:
    settings: Settings = {}
    for key, section in space.items():
        if section.uniform:
            settings[key] = float(random.uniform(*section.uniform))
        elif section.loguniform:
            low, high = (math.log(bound) for bound in section.loguniform)
            settings[key] = float(math.exp(random.uniform(low, high)))
        else:
            values = extremes(section)
            settings[key] = values[int(random.integers(len(values)))]
    return settings


def _short(key: str, settings: Mapping[str, Any]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        name = ".".join(parts[-count:])
        if sum(other == name or other.endswith(f".{name}") for other in settings) == 1:
            return name
    return key


def _text(value: Any) -> str:
    if isinstance(value, str) and value.endswith(".safetensors"):
        return "/".join(value.split("/")[-3:-1])  # a trained network is known by its run's folder
    return f"{value:.3g}" if isinstance(value, float) else str(value)
