"""What a sweep tries: the settings that `tune.space` and `tune.points` define, and their recipes.

Settings are a mapping of dotted recipe keys to values. The recipe itself validates all of them
before anything runs: a mistyped key or a value that is not allowed stops the sweep with the nearest
spelling.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fae.pipelines.config import Recipe, RecipeError, validate_recipe
from fae.pipelines.config.sections import SpaceSection, TuneSection

Settings = dict[str, Any]


def apply(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with the settings in it and without its sweep.

    Raises RecipeError that names the key.
    """
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
    """A short name: `key=value` of each setting, with as few last parts of the key as it takes."""
    return "  ".join(f"{_short(key, settings)}={_text(value)}" for key, value in settings.items())


def planned_settings(recipe: Recipe) -> list[Settings]:
    """All settings of a grid or of random draws, then the recipe's points: each once, all valid.

    With tune.algorithm=optuna these are the points only, because Optuna suggests the other settings
    one after another. Raises RecipeError.
    """
    tune = recipe.tune
    check_space(recipe)
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


def check_space(recipe: Recipe) -> None:
    """Raise RecipeError where the sweep tries nothing, or a key's values do not suit it.

    Listed values and the ends of an interval must be valid in the recipe; tune.algorithm=grid needs
    listed ones.
    """
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
        for value in _listed(space) or space.uniform or space.loguniform or ():
            apply(recipe, {key: value})


def tune_space(space: Mapping[str, SpaceSection]) -> dict[str, Any]:
    """The space as Ray Tune's domains, for a searcher that suggests from it."""
    from ray import tune

    domains: dict[str, Any] = {}
    for key, section in space.items():
        if section.uniform:
            domains[key] = tune.uniform(*section.uniform)
        elif section.loguniform:
            domains[key] = tune.loguniform(*section.loguniform)
        else:
            domains[key] = tune.choice(_listed(section))
    return domains


def _listed(space: SpaceSection) -> list[Any]:
    return space.grid or space.choice or []


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
            values = _listed(section)
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
        # A network's file always has the same name; its run's folder tells it from others.
        return "/".join(value.split("/")[-3:-1])
    return f"{value:.3g}" if isinstance(value, float) else str(value)
