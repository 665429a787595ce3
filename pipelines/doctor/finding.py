"""One line of `fae doctor`: what was checked, whether it is good, and what to do if it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What a check found out about `subject`. Only a problem makes the command fail."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<12} {self.message}"


def size_text(number: float) -> str:
    """`number` bytes for people, in MB or GB of powers of ten."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
