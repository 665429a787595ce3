"""Typed recipes: OmegaConf merges a YAML with dotted overrides, pydantic validates the result.

Every command starts here; an unknown key or a bad value stops with the key, what was given, what is
allowed and the nearest spelling. A field whose docstring says "not in the paper" has no value in
arXiv 2512.07829.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from fae_core.errors import UserError

from ..storage import redact
from .sections import (
    AutoencoderSection,
    BackboneSection,
    ChainSection,
    DataSection,
    EvaluateSection,
    GeneratorSection,
    PixelDecoderSection,
    PrecomputeSection,
    ProbeSection,
    SampleSection,
    Section,
    TextSection,
    TrackingSection,
    TuneSection,
)
from .sections.base import Execution, HashedPath, InputPath, OutputPath
from .sections.keys import keys_of, section_in, set_value, value_at

RECIPES = Path(__file__).parent / "recipes"
_ALTERNATIVE = re.compile(r"(literal|list|dict|tuple)\[.*\]|bool|int|float|str")
"""How pydantic names the alternatives of a key in the place of an error."""


class RecipeError(UserError, ValueError):
    """A recipe that cannot be used; the message is for the person who wrote it."""


class Recipe(Section):
    """One run, whole."""

    image_size: int = Field(256, gt=0)
    """Side [px] of the canonical crop, ADM's centre crop as uint8; the paper's."""
    seed: int = 0
    """Seed of initial weights, noise, order and sampling; not in the paper."""
    run: Execution[str | None] = None
    """Name of a training run; the same name and storage resume it."""
    storage: OutputPath[str] = "runs"
    """Folder or s3:// prefix where training runs, chains and sweeps live."""
    output: OutputPath[str | None] = None
    """Folder or s3:// prefix that `fae precompute` or `fae sample` writes."""
    latents: InputPath[str | None] = None
    """The latent store that a generator is trained on, an output of `fae precompute`."""
    prompt: str | None = None
    """A text to draw images of, with a generator of kind mmdit."""
    prompts: HashedPath[str | None] = None
    """Many of them: a text file (.txt) with one on each line, a .jsonl with {"prompt": …} on each
    line as GenEval's, or images with captions, read as the section `data` says."""
    data: DataSection = DataSection()
    backbone: BackboneSection = BackboneSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    pixel_decoder: PixelDecoderSection = PixelDecoderSection()
    text: TextSection = TextSection()
    generator: GeneratorSection = GeneratorSection()
    precompute: PrecomputeSection = PrecomputeSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection = EvaluateSection()
    probe: ProbeSection = ProbeSection()
    chain: ChainSection = ChainSection()
    tune: TuneSection = TuneSection()
    tracking: TrackingSection = TrackingSection()

    def to_yaml(self) -> str:
        """The whole recipe as YAML: what `--print-config` prints and every run writes.

        It has no passwords: those are for the environment, or for the command line.
        """
        hidden = self.model_copy(deep=True)
        for key in keys_of(type(self)):
            if key.secret and (value := value_at(self, key.name)):
                set_value(hidden, key.name, redact(value))
        return OmegaConf.to_yaml(OmegaConf.create(hidden.model_dump(mode="json")))

    def require(self, command: str, *names: str) -> list[str]:
        """The values of the dotted keys `names`, which `command` needs, in their order.

        A name may say how its value is written: `latents=STORE`. Raises RecipeError that says which
        of them are not given, and what they are.
        """
        keys = [name.partition("=")[0] for name in names]
        values = {key: value_at(self, key) for key in keys}
        absent = [name for name, value in values.items() if value in (None, "")]
        if absent:
            *first, last = (name if "=" in name else f"{name}=…" for name in names)
            listed = f"{', '.join(first)} and {last}" if first else last
            docs = {key.name: key.doc for key in keys_of(type(self))}
            about = "".join(f"\n  {name}: {docs[name]}" for name in absent)
            raise RecipeError(f"{command} needs {listed}. Not given:{about}")
        return list(values.values())


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe `name`, shipped or a YAML path, with `key=value` overrides. Raises RecipeError."""
    path = recipe_path(name)
    try:
        merged = OmegaConf.merge(read_yaml(path), parse_overrides(overrides))
        values = OmegaConf.to_container(merged, resolve=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None
    assert isinstance(values, dict)
    return validate_recipe({str(key): value for key, value in values.items()}, source=name)


def recipe_path(name: str) -> Path:
    """The file of the recipe `name`, shipped or a YAML path. Raises RecipeError without one."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"No recipe {name!r}.{hint} Shipped: {', '.join(recipe_names())}; or give a .yaml path."
        )
    return path


def read_yaml(path: Path) -> DictConfig:
    """What a recipe's file sets. Raises RecipeError where it is no mapping in YAML."""
    try:
        read = OmegaConf.load(path)
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None
    except Exception as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(read, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values.")
    return read


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """What `key=value` overrides set. Raises RecipeError for one that is not of this form."""
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise RecipeError(
                f"Override {override!r} is not key=value (for example autoencoder.latent_dim=48)."
            )
    return OmegaConf.from_dotlist(list(overrides))


def validate_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """A Recipe from nested plain values. Raises RecipeError that names every wrong key."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = _explained(error.errors())
        raise RecipeError(f"{source}:\n  " + "\n  ".join(lines)) from None


def _explained(errors: Sequence[Any]) -> list[str]:
    """A line for each wrong key; a key with alternatives has an error for each, but one line."""
    wrong: dict[str, tuple[Any, list[str]]] = {}
    unknown = []
    for item in errors:
        location = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            unknown.append(_unknown(location))
            continue
        key = ".".join(part for part in location if not _ALTERNATIVE.fullmatch(part))
        wrong.setdefault(key, (item["input"], []))[1].append(item["msg"])
    return unknown + [
        f"{key}: given {given!r}; {_either(messages)}." for key, (given, messages) in wrong.items()
    ]


def _either(messages: Sequence[str]) -> str:
    """ "Input should be a" and "Input should be b, for a reason" as "Input should be a or b"."""
    if len(messages) == 1:
        return messages[0]
    start = "Input should be "
    whats = [message.removeprefix(start).partition(", unable")[0] for message in messages]
    return start + " or ".join(whats)


def _unknown(location: Sequence[str]) -> str:
    key = ".".join(location)
    section: Any = Recipe
    for part in location[:-1]:
        if part in section.model_fields:
            section = section_in(section.model_fields[part].annotation) or section
    allowed = sorted(section.model_fields)
    near = difflib.get_close_matches(location[-1], allowed, n=1)
    hint = f" Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
    return f"unknown key {key!r}.{hint} Allowed here: {', '.join(allowed)}."
