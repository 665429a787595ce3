"""What a recipe's keys are for: which decide a result, which are places, which are secret.

All of it is derived from the fields. Every job, the chain and the submission ask here instead of
keeping lists of keys. Neither torch nor Ray is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf

from ..storage import paths
from .recipe import Recipe, RecipeError, validate_recipe
from .sections import Section
from .sections.keys import RecipeKey, flatten, keys_of, set_value, value_at

Values = Mapping[str, Any]
FOR_ANY_IMAGES = (
    "backbone.weights",
    "precompute.precision",
    "data.max_pixels",
    "data.decoder",
    "data.color_profile",
)
"""Keys of a training's recipe that hold for other images too."""


class PathValue(NamedTuple):
    """A local path or address that a recipe sets, and whether jobs read or write there."""

    role: Literal["input", "output"]
    value: str


def walk_keys(section: type[Section] = Recipe) -> Iterator[RecipeKey]:
    """Every key in the order of the fields; `*` stands for the members of a list or mapping."""
    return keys_of(section)


def deciding_values(
    recipe: Recipe | Values, sections: Collection[str], addresses: bool = True
) -> dict[str, Any]:
    """The values under `sections` that decide a job's result, as plain JSON values by dotted key.

    `sections` are sections or single keys of the recipe, which may also be given as nested plain
    values. Keys that say how a job runs, places that are written, and inputs that are identified by
    their content are left out. A job that hashes all that it reads sets `addresses` to False, which
    leaves out the other inputs too.
    """
    values = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
    left_out = {key.name for key in walk_keys() if not key.decides or (key.place and not addresses)}
    return {
        name: value
        for name, value in flatten(values).items()
        if _is_under(name, sections) and not _is_under(name, left_out)
    }


def path_values(recipe: Recipe) -> dict[str, PathValue]:
    """Every place that the recipe or a default sets, by dotted key, as it was given."""
    found = {}
    for key in walk_keys():
        if key.place is None:
            continue
        value = value_at(recipe, key.name)
        if value and value not in key.place.words:
            found[key.name] = PathValue(key.place.role, value)
    return found


def recipe_for_any_images(checkpoint: str) -> Recipe:
    """FOR_ANY_IMAGES of the recipe.yaml beside `checkpoint`, a file or folder; else defaults.

    The other keys are about the training's own images, and another version may have written them.
    Raises RecipeError where the file is no YAML or a value is not known here, and StorageError.
    """
    folder = checkpoint.rpartition("/")[0] if checkpoint.endswith(".safetensors") else checkpoint
    uri = paths.join(folder or ".", "recipe.yaml")
    if not paths.exists(uri):
        return Recipe()
    try:
        read: Any = OmegaConf.to_container(OmegaConf.create(paths.read_bytes(uri).decode()))
        values = flatten(read)
    except Exception as error:
        raise RecipeError(f"{uri} is no recipe: {error}") from None
    kept: dict[str, dict[str, Any]] = {}
    for name in FOR_ANY_IMAGES:
        if values.get(name) is not None:
            section, _, key = name.partition(".")
            kept.setdefault(section, {})[key] = values[name]
    return validate_recipe(kept, source=uri)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute local paths: Ray's workers run in other folders than the driver."""
    made = recipe.model_copy(deep=True)
    for name, (_, value) in path_values(recipe).items():
        remote = "://" in value and not value.startswith("file://")
        if not remote and not value.startswith(paths.SHIPPED):
            set_value(made, name, paths.filesystem(value)[1])
    return made


def _is_under(name: str, keys: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in keys for count in range(1, len(parts) + 1))
