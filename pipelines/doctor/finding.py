"""One line of `fae doctor`: ok, a warning or a problem, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was found of `subject`."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<12} {self.message}"
