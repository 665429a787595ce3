"""Typed recipes: OmegaConf merges a shipped or given YAML with dotted overrides, pydantic validates the result.

Every command starts here; an unknown key or a bad value stops with the key, what was given, what is allowed
and the nearest spelling. A field whose docstring says "not in the paper" has no value in arXiv 2512.07829.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
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
    TrackingSection,
    TuneSection,
)
from .sections.base import Execution, InputPath, OutputPath
from .sections.keys import keys_of, section_in, value_at

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(UserError, ValueError):
    """A recipe that cannot be used; the message is for the person who wrote it."""


class Recipe(Section):
    """One run, whole."""

    image_size: int = Field(256, gt=0)
    """Side of the canonical uint8 crop."""
    seed: int = 0
    run: Execution[str | None] = None
    """Name of a training run; the same name and storage resumes it."""
    storage: OutputPath[str] = "runs"
    """Folder or s3:// prefix where training runs live."""
    output: OutputPath[str | None] = None
    """Folder or s3:// prefix that precompute or sample writes."""
    latents: InputPath[str | None] = None
    """The latent store that a generator is trained on."""
    data: DataSection = DataSection()
    backbone: BackboneSection = BackboneSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    pixel_decoder: PixelDecoderSection = PixelDecoderSection()
    generator: GeneratorSection = GeneratorSection()
    precompute: PrecomputeSection = PrecomputeSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection = EvaluateSection()
    probe: ProbeSection = ProbeSection()
    chain: ChainSection = ChainSection()
    tune: TuneSection = TuneSection()
    tracking: TrackingSection = TrackingSection()

    def to_yaml(self) -> str:
        """The whole recipe as YAML, as `--print-config` prints it and every run writes it beside its outputs.

        Without passwords: those are for the environment, or for the command line.
        """
        values = self.model_dump(mode="json")
        for key in keys_of(type(self)):
            if key.secret and (secret := value_at(self, key.name)):
                *sections, last = key.name.split(".")
                place = values
                for section in sections:
                    place = place[section]
                place[last] = redact(secret)
        return OmegaConf.to_yaml(OmegaConf.create(values))


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe `name` (shipped, or a YAML path) with `key=value` overrides. Raises RecipeError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"No recipe {name!r}.{hint} Shipped: {', '.join(recipe_names())}; or give a .yaml path."
        )
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise RecipeError(
                f"Override {override!r} is not key=value (for example autoencoder.latent_dim=48)."
            )
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None
    except Exception as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values.")
    return validate_recipe({str(key): value for key, value in values.items()}, source=name)


def validate_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """A Recipe from nested plain values. Raises RecipeError that names every wrong key."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError(f"{source}:\n  " + "\n  ".join(lines)) from None


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in location[:-1]:
            if part in section.model_fields:
                section = section_in(section.model_fields[part].annotation) or section
        allowed = sorted(section.model_fields)
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f" Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        return f"unknown key {key!r}.{hint} Allowed here: {', '.join(allowed)}."
    return f"{key}: given {item['input']!r}; {item['msg']}."
