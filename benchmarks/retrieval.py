"""What a text-to-image generator learned: is the right picture nearest to what it draws?

    python -m benchmarks.retrieval NETWORKS HELD_OUT TRAINING [--figure FILE.png] [--images 100]

NETWORKS is a published folder with a generator of text, like shipped:emoji. For some captions of
HELD_OUT and of TRAINING it draws one picture at each guidance scale. `found` is the share whose own
true picture is the nearest among all of these by the backbone's class token, `found in five` the
share where it is among the five nearest; chance is 1/images. The last row is the true pictures
after autoencoder and pixel decoder: what a perfect generator could reach. The figure shows held-out
captions: samples, the true picture, and the training picture that is nearest to the sample of the
middle scale.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fae
from benchmarks.environment import run
from benchmarks.stages import batched, crops
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.sources import list_images
from fae.pipelines.sampling.grid import at_scale
from fae.pipelines.sampling.image_sampler import ImageSampler
from fae_core.figures import picture_grid

RECIPE = "emoji-dinov2s"
SCALES = (1.0, 2.0, 4.0)
ROWS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks")
    parser.add_argument("held_out")
    parser.add_argument("training")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    model = fae.FeatureAutoencoder.from_pretrained(arguments.networks)
    print(f"| captions | guidance | found | found in five |\n{'|---' * 4}|", flush=True)
    for name in ("held_out", "training"):
        path = getattr(arguments, name)
        captions, images = captioned(path, model.image_size, arguments.images)
        drawn = {scale: draw(arguments.networks, captions, scale) for scale in SCALES}
        rebuilt = torch.from_numpy(model.decode_images(model.encode_images(images.numpy())))
        for scale, pictures in {**drawn, "true latents": rebuilt}.items():
            shares = found(model.backbone, pictures, images)
            print(f"| {name} | {scale} | {' | '.join(f'{s:.2f}' for s in shares)} |", flush=True)
        if name == "held_out" and arguments.figure:
            train = crops(arguments.training, model.image_size)
            near = train[nearest(model.backbone, drawn[SCALES[1]], train)]
            columns = [*drawn.values(), images, near]
            rows = [[c[i].numpy() for c in columns] for i in range(min(ROWS, len(images)))]
            titles = [*(f"guidance {s:g}" for s in SCALES), "true", "nearest in training"]
            arguments.figure.write_bytes(picture_grid(rows, titles, names_of_rows=captions[:ROWS]))


def captioned(path: str, size: int, limit: int) -> tuple[list[str], Tensor]:
    """`limit` captions, drawn by a seed, and their pictures uint8 [n, size, size, 3]."""
    data = load_recipe(RECIPE, [f"data.path={path}"]).data
    captions = [str(record.caption) for record in list_images(data)]
    chosen = np.random.default_rng(0).permutation(len(captions))[:limit]
    return [captions[i] for i in chosen], crops(path, size)[chosen]


def draw(networks: str, captions: list[str], scale: float) -> Tensor:
    """One picture uint8 [S, S, 3] of each caption."""
    names = ("autoencoder", "pixel_decoder", "generator")
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(captions))
        places = [f"{name}.checkpoint={networks}" for name in names]
        sampler = ImageSampler(load_recipe(RECIPE, [*places, f"prompts={prompts}"]))
    return torch.from_numpy(at_scale(sampler, list(range(len(captions))), scale))


def class_tokens(backbone: torch.nn.Module, pictures: Tensor) -> Tensor:
    """[n, D] of uint8 pictures."""
    return batched(lambda part: backbone.tokens(part)[1], pictures)  # type: ignore[operator]


def nearest(backbone: torch.nn.Module, pictures: Tensor, train: Tensor) -> Tensor:
    """Which of `train` is nearest to each of the drawn `pictures`.

    The mean of either set is subtracted: drawn pictures are blurred, true ones are not.
    """
    tokens = [class_tokens(backbone, some) for some in (pictures, train)]
    centred = [F.normalize(some - some.mean(0), dim=-1) for some in tokens]
    return (centred[0] @ centred[1].T).argmax(1)


def found(backbone: torch.nn.Module, pictures: Tensor, true: Tensor) -> tuple[float, float]:
    """Shares of pictures whose own true one is the nearest, and among the five nearest."""
    tokens = [F.normalize(class_tokens(backbone, some), dim=-1) for some in (pictures, true)]
    own = (tokens[0] @ tokens[1].T).topk(5).indices == torch.arange(len(pictures))[:, None]
    return float(own[:, 0].float().mean()), float(own.any(1).float().mean())


if __name__ == "__main__":
    run(main)
