"""Local paths of a recipe made absolute, because Ray's workers run in other folders than the driver."""

from __future__ import annotations

from pathlib import Path

from ..storage import paths
from .recipe import Recipe


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute local paths: Ray's workers run in other folders than the driver."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or paths.is_s3(path) else paths.filesystem(path)[1]

    made = recipe.model_copy(deep=True)
    made.storage = absolute(recipe.storage) or recipe.storage
    made.output = absolute(recipe.output)
    made.data.path = absolute(recipe.data.path)
    made.latents = absolute(recipe.latents)
    for section in (made.autoencoder, made.pixel_decoder, made.generator):
        section.checkpoint = absolute(section.checkpoint)
    made.pixel_decoder.start_from = absolute(recipe.pixel_decoder.start_from)
    for name in ("images", "reference", "output", "inception_weights"):
        setattr(made.evaluate, name, absolute(getattr(recipe.evaluate, name)))
    if Path(recipe.backbone.weights).is_file():
        made.backbone.weights = str(Path(recipe.backbone.weights).absolute())
    return made
