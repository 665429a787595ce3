"""The demo's two pictures: what every stage keeps of pictures, and pictures of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fae_core.errors import UserError
from fae_core.figures import picture_grid, reconstruction_rows

from ..config import Recipe
from ..data import list_images
from ..data.reading import load_crops
from ..explore.pictures import pictures_of
from ..latents import LatentEncoder
from ..networks import features_of
from ..sampling import LatentDecoder
from ..sampling.grid import at_scale
from ..sampling.image_sampler import ImageSampler
from ..storage import paths
from .screen import Advance

NUM_PICTURES = 4
SCALES = (1.0, 2.0, 4.0)
"""Guidance scales of the columns."""
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
"""Of scikit-image."""


@dataclass(frozen=True)
class Kept:
    """What the rebuilt features keep of the backbone's, by group of pictures."""

    figure: bytes
    """A PNG."""
    cosines: dict[str, float]
    """Group -> mean cosine similarity of rebuilt features and features, over all patches."""


def write_photographs(folder: Path) -> None:
    """Write scikit-image's PHOTOGRAPHS as FOLDER/NAME.png. Raises UserError where it is missing."""
    try:
        import skimage.data
        from PIL import Image
    except ImportError:
        raise UserError(
            "The demo shows photographs of scikit-image: pip install 'fae-ray[demo]', or give your "
            "own, --images FOLDER."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        path = folder / f"{name}.png"
        if not path.exists():
            Image.fromarray(getattr(skimage.data, name)()).convert("RGB").save(path)


@torch.inference_mode()
def kept_by_stages(recipe: Recipe, groups: dict[str, str]) -> Kept:
    """Some pictures of each folder of `groups`, by name, through every stage.

    Raises ExploreError and SourceError where a folder holds no picture.
    """
    (uri,) = recipe.require("the demo", "autoencoder.checkpoint")
    found = {
        name: pictures_of([place], paths.join(uri, "autoencoder.safetensors"), NUM_PICTURES)
        for name, place in groups.items()
    }
    encoder = LatentEncoder.of(recipe)
    decoder = LatentDecoder.of(recipe, encoder.device, encoder.autoencoder_sha256)
    images = np.concatenate([pictures.images for pictures in found.values()])
    features = features_of(encoder.backbone, torch.from_numpy(images), encoder.precision)
    latents = encoder.autoencoder.encode(features).mean
    rebuilt = encoder.autoencoder.decode(latents)
    grid = encoder.backbone.grid
    decoded = decoder(latents.transpose(1, 2).unflatten(2, grid)).numpy()
    columns = reconstruction_rows(images, features.numpy(), latents.numpy(), rebuilt.numpy(), grid)
    cosine = torch.cosine_similarity(features, rebuilt, dim=-1).mean(1).tolist()
    rows = [[*column, picture] for column, picture in zip(columns, decoded, strict=True)]
    titles = ("picture", "DINOv2", "latent", "rebuilt", "pixels of the latent")
    names = [name for name, pictures in found.items() for _ in pictures.keys]
    means = {
        name: float(np.mean([c for c, group in zip(cosine, names, strict=True) if group == name]))
        for name in found
    }
    return Kept(picture_grid(rows, titles), means)


def prompt_rows(
    recipe: Recipe, true_pictures: Sequence[np.ndarray | None], advance: Advance
) -> bytes:
    """A PNG with a row for each prompt of the recipe: samples at SCALES, then the true picture.

    `true_pictures` has a uint8 picture for each prompt, None where there is none.
    """
    sampler = ImageSampler(recipe)
    labels = list(range(sampler.num_classes))
    columns = []
    for number, scale in enumerate(SCALES):
        columns.append(at_scale(sampler, labels, scale))
        advance((number + 1) / len(SCALES))
    rows = [list(row) for row in zip(*columns, true_pictures, strict=True)]
    titles = [f"guidance {scale:g}" for scale in SCALES]
    if any(true is not None for true in true_pictures):
        titles.append("true picture")
    else:
        rows = [row[:-1] for row in rows]
    return picture_grid(rows, titles, names_of_rows=[sampler.name(label) for label in labels])


def captioned_pictures(
    recipe: Recipe, folder: str, captions: Sequence[str]
) -> list[np.ndarray | None]:
    """The picture uint8 [S, S, 3] of `folder` with each caption, None where there is none."""
    data = recipe.data.model_copy(update={"path": folder})
    by_caption = {record.caption: record for record in list_images(data)}
    chosen = [by_caption[caption] for caption in captions if caption in by_caption]
    images, _, _ = load_crops(chosen, recipe.image_size, data)
    found = {record.caption: image for record, image in zip(chosen, images, strict=True)}
    return [found.get(caption) for caption in captions]
