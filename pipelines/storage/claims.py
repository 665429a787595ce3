"""A place belongs to the work that was first written there; other work is refused with what
differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fae_core.errors import UserError


class StoreError(UserError, ValueError):
    """A latent store that cannot be read or completed; the message says why."""


class StoreMismatch(StoreError):
    """A place that holds other work; the message names the parts that differ."""


def differences(
    there: Mapping[str, Any], now: Mapping[str, Any], show: Callable[[Any], str] = repr
) -> list[str]:
    """`name: VALUE there, VALUE now` for each name whose values differ; `show` makes text of a
    value.

    A name that one side lacks is shown as nothing, and equals None on the other side.
    """

    def text(values: Mapping[str, Any], name: str) -> str:
        return show(values[name]) if name in values else "nothing"

    return [
        f"{name}: {text(there, name)} there, {text(now, name)} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]


def refuse_other_work(
    holds: str, differing: Sequence[str], advice: str, error: type[UserError] = StoreMismatch
) -> None:
    """Raises `error` where there are differences.

    `holds` says which place holds what other work, `advice` what to do instead.
    """
    if differing:
        raise error(f"{holds}:\n  " + "\n  ".join(differing) + f"\n{advice}")
