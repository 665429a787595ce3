"""What the sections of a recipe have in common, and how a field says what its key is for.

Unknown keys are refused, and docstrings document the keys. A key decides the result of a job unless
its type says otherwise: `Execution[int]` is how a job is run; `InputPath[str | None]`,
`HashedPath[…]` and `OutputPath[…]` are places; `Secret[…]` may hold a password. Everything that
depends on this is derived from the fields (`..facts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


@dataclass(frozen=True)
class RunsOnly:
    """The key says how or where a job runs; the same result comes out for every value."""


@dataclass(frozen=True)
class Place:
    """The key is a local path or an address; `words` are values that are something else.

    `decides` says whether the address itself stands for what a job reads there. It does not where a
    job writes, and where every job that reads the place identifies it by a hash of what it holds.
    """

    role: Literal["input", "output"]
    decides: bool
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class HoldsPassword:
    """The key's value may hold credentials, which are neither printed nor written."""


Execution = Annotated[T, RunsOnly()]
"""How a job is run, never what comes out."""
InputPath = Annotated[T, Place("input", decides=True)]
"""A local path or s3:// address that a job reads; another address is taken for another input."""
HashedPath = Annotated[T, Place("input", decides=False)]
"""A local path or s3:// address whose content is hashed by every job that reads it."""
OutputPath = Annotated[T, Place("output", decides=False)]
"""A local path or s3:// address that a job writes."""
Secret = Annotated[T, HoldsPassword()]
"""A value that may hold credentials."""
Precision = Literal["auto", "fp32", "bf16"]
"""The dtype of autocast: `auto` is bf16 where the device multiplies matrices faster in it."""


class Section(BaseModel):
    """A mapping of recipe keys to values."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
