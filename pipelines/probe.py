"""`fae probe`: what reconstructed features and latents still know of what the backbone's features know."""

from __future__ import annotations

from pipelines.config import Recipe


def probe(recipe: Recipe) -> dict[str, float]:
    """The scores by name, each with `_low` and `_high` where it is an accuracy."""
    raise NotImplementedError


def summary(scores: dict[str, float]) -> str:
    """The scores as lines for a terminal."""
    raise NotImplementedError
