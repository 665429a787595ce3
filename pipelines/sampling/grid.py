"""One PNG of samples: classes or prompts in rows, samples or guidance scales in columns."""

from __future__ import annotations

import numpy as np

from fae_core.figures import picture_grid

from ..config import Recipe
from ..config.sections import GuidanceSection
from ..storage import paths
from .image_sampler import ImageSampler


def draw_grid(recipe: Recipe, path: str, columns: int = 8, scales: tuple[float, ...] = ()) -> None:
    """One PNG for a look: a class or a prompt in each row, images of it in the columns.

    With `scales` each column has another guidance scale, from the same noise.
    """
    # The largest scale shows whether the generator can be guided.
    sampler = ImageSampler(_with_scale(recipe, max(scales)) if scales else recipe)
    classes = sampler.classes or list(range(min(sampler.num_classes, 10)))
    rows: list[list[np.ndarray | None]]
    if scales:
        columns_drawn = [at_scale(sampler, classes, scale) for scale in scales]
        rows = [list(row) for row in zip(*columns_drawn, strict=True)]
        titles = [f"scale {scale:g}" for scale in scales]
    else:
        indices = list(range(columns * len(classes)))
        drawn = sampler(indices, [label for label in classes for _ in range(columns)])
        rows = [list(drawn[i : i + columns]) for i in range(0, len(indices), columns)]
        titles = [""] * columns
    names = [sampler.name(label) for label in classes]
    paths.write_bytes(path, picture_grid(rows, titles, names_of_rows=names))


def at_scale(sampler: ImageSampler, labels: list[int], scale: float) -> np.ndarray:
    """Pictures uint8 [n, S, S, 3] of `labels` at a guidance scale; each row has its own noise."""
    recipe = sampler.recipe
    sampler.recipe = _with_scale(recipe, scale)
    try:
        return sampler(list(range(len(labels))), labels)
    finally:
        sampler.recipe = recipe


def _with_scale(recipe: Recipe, scale: float) -> Recipe:
    made = recipe.model_copy(deep=True)
    made.sample.guidance = [GuidanceSection(start=1.0, end=0.0, scale=scale)]
    made.sample.flow_guidance = scale
    return made
