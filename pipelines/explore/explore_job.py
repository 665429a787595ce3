"""Runs `fae explore`: one HTML page about pictures, their features and their latents.

Click a patch and see its similarity to all others in latents and in features side by side, as in
arXiv 2512.07829's figure of patch similarity; beside that a map, neighbours, and errors.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..pages import render
from ..storage import paths
from .exploration import explore_data
from .pictures import ExploreError, pictures_of

MAX_BYTES = 20_000_000
"""Largest page: what browsers open at once and mail takes."""
MAX_IMAGES = 400


def explore(
    places: Sequence[str], output: str, autoencoder: str | None = None, num_images: int = 60
) -> str:
    """Write the page about at most `num_images` pictures to `output`; says what it shows.

    `places` is a latent store, or files and folders of images, which need the checkpoint
    `autoencoder`. Raises ExploreError, SourceError, StorageError, CheckpointError.
    """
    if not 2 <= num_images <= MAX_IMAGES:
        raise ExploreError(f"--images {num_images}: a page shows 2 to {MAX_IMAGES} pictures.")
    pictures = pictures_of(places, autoencoder, num_images)
    if len(pictures.keys) < 2:
        raise ExploreError(f"{pictures.about}: a page compares pictures, so it takes two or more.")
    data = explore_data(pictures)
    below = max(kind["difference"] for kind in data["kinds"])
    page = render(
        "explore.html.j2",
        title="Pictures, features and latents",
        about=pictures.about,
        made_by=(
            f"Made by fae explore with {pictures.recipe.autoencoder.checkpoint}. Cosines are "
            f"computed from features in bytes; 95 % are within {below:.3f} of the exact ones. "
            "Nearest pictures and the map compare means over patches."
        ),
        data=data,
    ).encode()
    if len(page) > MAX_BYTES:
        fits = max(2, len(pictures.keys) * MAX_BYTES // len(page))
        raise ExploreError(
            f"The page of {len(pictures.keys)} pictures would be {len(page) / 1e6:.0f} MB, more "
            f"than {MAX_BYTES / 1e6:.0f} MB: give --images {fits} or fewer."
        )
    paths.write_bytes(output, page)
    return f"{len(pictures.keys)} pictures, {len(page) / 1e6:.1f} MB"
