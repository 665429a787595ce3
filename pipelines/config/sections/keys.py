"""The keys of a section, found by walking its fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from .base import HoldsPassword, Place, RunsOnly, Section


@dataclass(frozen=True)
class RecipeKey:
    """One key: its dotted name, the section class that has it, and what its field says about it."""

    name: str
    section: type[Section]
    field: FieldInfo

    @property
    def doc(self) -> str:
        """The docstring in one line; empty without one."""
        return " ".join((self.field.description or "").split())

    @property
    def default(self) -> Any:
        """The default value; pydantic's PydanticUndefined where the key has to be given."""
        return self.field.default

    @property
    def runs_only(self) -> bool:
        """Whether the key says how a job runs and never what comes out."""
        return any(isinstance(fact, RunsOnly) for fact in self.field.metadata)

    @property
    def place(self) -> Place | None:
        """What the key's path or address is for; None where the value is none."""
        return next((fact for fact in self.field.metadata if isinstance(fact, Place)), None)

    @property
    def secret(self) -> bool:
        """Whether the value may hold credentials."""
        return any(isinstance(fact, HoldsPassword) for fact in self.field.metadata)

    @property
    def decides(self) -> bool:
        """Whether another value may lead to another result."""
        return not self.runs_only and (self.place is None or self.place.decides)


def keys_of(section: type[Section], prefix: str = "") -> Iterator[RecipeKey]:
    """The keys of `section` and of the sections in it, in the order of the fields.

    The name `*` stands for the members of lists and mappings that hold sections.
    """
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None or inner is not field.annotation:
            yield RecipeKey(f"{prefix}{name}", section, field)
        if inner is not None:
            below = name if inner is field.annotation else f"{name}.*"
            yield from keys_of(inner, f"{prefix}{below}.")


def section_in(annotation: Any) -> type[Section] | None:
    """The section class in a field's annotation, also inside lists, mappings and alternatives."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, Section) else None
    return next((found for found in map(section_in, get_args(annotation)) if found), None)


def value_at(section: Section, name: str) -> Any:
    """The value of the dotted key `name` of `section`."""
    value: Any = section
    for part in name.split("."):
        value = getattr(value, part)
    return value


def set_value(section: Section, name: str, value: Any) -> None:
    """Set the dotted key `name` of `section`."""
    parents, _, last = name.rpartition(".")
    setattr(value_at(section, parents) if parents else section, last, value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat
