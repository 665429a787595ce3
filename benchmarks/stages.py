"""What is lost from picture to picture: by the pixel decoder, by linear PCA, by the autoencoder.

    python -m benchmarks.stages NETWORKS HELD_OUT --train TRAINING [--fit 500] [--figure FILE.png]

NETWORKS is a published folder with autoencoder and pixel decoder, like shipped:emoji. The pictures
of HELD_OUT are decoded from the backbone's own features, from features that linear PCA of the
latent's size rebuilds, and from those that the autoencoder rebuilds. The PCA is fitted to the first
pictures of TRAINING. Feature error is of standardized features. `found` is the share of pictures
whose decoded version has, among 100 pictures, its original as the nearest by the backbone's class
token; `distance` is the backbone's perceptual distance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fae
from benchmarks.environment import run
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.reading import load_crops
from fae.pipelines.data.sources import list_images
from fae_core.figures import picture_grid
from fae_core.linear_baseline import Covariance
from fae_core.losses import BackboneDistance
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.pixel_decoder import from_uint8, to_uint8

BATCH = 16
CANDIDATES = 100
ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks")
    parser.add_argument("held_out")
    parser.add_argument("--train", required=True)
    parser.add_argument("--fit", type=int, default=500, help="pictures that fit the PCA")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    model = fae.FeatureAutoencoder.from_pretrained(arguments.networks)
    images = crops(arguments.held_out, model.image_size)
    features = batched(model.backbone, images)
    rebuilt = {
        "features": features,
        "PCA": linear(model, crops(arguments.train, model.image_size, arguments.fit), features),
        "FAE": batched(lambda f: model.autoencoder.decode(model.autoencoder.encode(f).mode()),
                       features),
    }  # fmt: skip
    print(f"{len(images)} pictures")
    print("| pixels from | feature error | PSNR | SSIM | distance | found |")
    print("|---|---|---|---|---|---|", flush=True)
    decoded = {}
    for name, source in rebuilt.items():
        decoded[name] = to_uint8(batched(model.pixel_decoder, source))
        error = ((source - features) / model.autoencoder.feature_std).square().mean()
        numbers = scores(model.backbone, decoded[name], images)
        row = [f"{float(error):.3f}", *(f"{value:.3f}" for value in numbers)]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    if arguments.figure:
        chosen = np.random.default_rng(0).permutation(len(images))[:ROWS]
        columns = [images, *decoded.values()]
        rows = [[column[i].numpy() for column in columns] for i in chosen]
        titles = ("original", *(f"from {name}" for name in decoded))
        arguments.figure.write_bytes(picture_grid(rows, titles))


def crops(path: str, size: int, limit: int | None = None) -> Tensor:
    """Crops uint8 [n, size, size, 3] of the pictures at `path`."""
    recipe = load_recipe("photos-dinov2s", [f"data.path={path}"])
    images, _, _ = load_crops(list_images(recipe.data)[:limit], size, recipe.data)
    return torch.from_numpy(images)


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """`function` of the inputs, BATCH at a time."""
    return torch.cat([function(part) for part in inputs.split(BATCH)])


def linear(model: fae.FeatureAutoencoder, images: Tensor, features: Tensor) -> Tensor:
    """`features` after a PCA, fitted to the features of `images`, with the latent's channels."""
    covariance = Covariance(model.backbone.dim)
    for part in images.split(BATCH):
        covariance.update(model.backbone(part).numpy())
    baseline = covariance.fit(model.autoencoder.config.latent_dim)
    return torch.from_numpy(baseline.reconstruct(features.numpy())).float()


def scores(backbone: torch.nn.Module, output: Tensor, target: Tensor) -> list[float]:
    """Mean PSNR, SSIM and perceptual distance of uint8 images, and the share that is found."""
    distance = BackboneDistance(backbone)  # type: ignore[arg-type]
    sums = torch.zeros(3)
    for a, b in zip(output.split(BATCH), target.split(BATCH), strict=True):
        x, y = from_uint8(a), from_uint8(b)
        with torch.no_grad():
            sums += torch.stack([psnr(x, y).sum(), ssim(x, y).sum(), distance(x, y).sum()])
    tokens = [
        F.normalize(batched(lambda part: backbone.tokens(part)[1], images[:CANDIDATES]), dim=-1)
        for images in (output, target)
    ]
    nearest = (tokens[0] @ tokens[1].T).argmax(1)
    found = float((nearest == torch.arange(len(nearest))).float().mean())
    return [*(sums / len(output)).tolist(), found]


if __name__ == "__main__":
    run(main)
