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
    sampler = ImageSampler(recipe)
    classes = sampler.classes or list(range(min(sampler.num_classes, 10)))
    settings: list[tuple[str, Recipe]] = [("", recipe)] * columns
    if scales:
        settings = [(f"scale {scale:g}", _with_scale(recipe, scale)) for scale in scales]
    rows: list[list[np.ndarray | None]] = []
    for row, label in enumerate(classes):
        tiles: list[np.ndarray | None] = []
        if scales:
            for _, changed in settings:
                sampler.recipe = changed
                tiles.append(sampler([row], [label])[0])
        else:
            first = row * columns
            tiles += list(sampler(list(range(first, first + columns)), [label] * columns))
        rows.append(tiles)
    names = [sampler.name(label) for label in classes]
    figure = picture_grid(rows, [title for title, _ in settings], names_of_rows=names)
    paths.write_bytes(path, figure)


def _with_scale(recipe: Recipe, scale: float) -> Recipe:
    made = recipe.model_copy(deep=True)
    made.sample.guidance = [GuidanceSection(start=1.0, end=0.0, scale=scale)]
    made.sample.flow_guidance = scale
    return made
