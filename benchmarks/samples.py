r"""Scores and a figure of generated images of a labelled data set, without a download.

    python -m benchmarks.samples fashion-dinov2s \
        --train fashion/train.parquet --test fashion/test.parquet \
        --samples dit=samples-dit starflow=samples-starflow --output report

Class accuracy is that of a logistic regression, fitted to the class tokens of real training images,
on the samples and on real test images. The Fréchet distance to real training images is computed
from the same tokens, also for as many real test images as there are samples. The figure shows a few
samples with their nearest training images. The row "real test, rebuilt" passes the test images
through autoencoder and pixel decoder, which a perfect generator would reach with these decoders.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.environment import describe
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.reading import load_crops
from fae.pipelines.data.sources import list_images
from fae.pipelines.networks.loading import backbone_of, load_checkpoint
from fae.pipelines.sampling.sample_store import read_samples
from fae_core.backbone import Backbone
from fae_core.figures import picture_grid
from fae_core.metrics.frechet import frechet_of_features
from fae_core.pixel_decoder import to_uint8

BATCH = 128
NEIGHBOURS = 4


def real_images(recipe: Recipe, path: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops uint8 [n, S, S, 3] and labels [n] of the first `limit` images of a source."""
    data = recipe.data.model_copy(update={"path": path, "limit": limit})
    records = list_images(data)
    images, kept, _ = load_crops(records, recipe.image_size, data)
    return images, np.array([records[i].label for i in kept])


def drawn_images(uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, S, S, 3] and labels [n] of a folder that `fae sample` wrote."""
    manifest = json.loads((Path(uri) / "manifest.json").read_text())
    images, labels = zip(*read_samples(uri, len(manifest["shards"])), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def batches(images: np.ndarray) -> Iterator[torch.Tensor]:
    """uint8 tensors of at most BATCH images."""
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(images[start : start + BATCH].copy())


@torch.inference_mode()
def class_tokens(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    """Class tokens [n, D] float32."""
    found = []
    for batch in batches(images):
        with torch.autocast("cpu", torch.bfloat16):
            token = backbone.tokens(batch)[1]
        assert token is not None
        found.append(token.float().numpy())
    return np.concatenate(found)


@torch.inference_mode()
def rebuilt_images(recipe: Recipe, backbone: Backbone, images: np.ndarray) -> np.ndarray:
    """The images after autoencoder and pixel decoder, uint8 [n, S, S, 3]."""
    assert recipe.autoencoder.checkpoint and recipe.pixel_decoder.checkpoint
    autoencoder = load_checkpoint(recipe.autoencoder.checkpoint, "autoencoder").module
    decoder = load_checkpoint(recipe.pixel_decoder.checkpoint, "pixel_decoder").module
    parts = []
    for batch in batches(images):
        latents = autoencoder.encode(backbone(batch)).mode()
        parts.append(to_uint8(decoder(autoencoder.decode(latents))).numpy())
    return np.concatenate(parts)


def neighbours_figure(
    sets: dict[str, tuple[np.ndarray, np.ndarray]], train: tuple[np.ndarray, np.ndarray]
) -> bytes:
    """Four samples of each set beside their nearest training images, as a PNG.

    Nearness is the cosine of class tokens; the sets and `train` hold (images, tokens).
    """
    rows: list[list[np.ndarray | None]] = []
    train_images, train_tokens = train
    unit = train_tokens / np.linalg.norm(train_tokens, axis=1, keepdims=True)
    for images, tokens in sets.values():
        for index in range(NEIGHBOURS):
            nearest = np.argsort(-(unit @ tokens[index]))[:NEIGHBOURS]
            rows.append([images[index], *train_images[nearest]])
    titles = ["sample", "nearest training images", *[""] * (NEIGHBOURS - 1)]
    return picture_grid(rows, titles)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--samples", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--output", required=True, help="folder for scores.json and neighbours.png")
    parser.add_argument("--train-images", type=int, default=6000)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments, unknown = parser.parse_known_args()
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *unknown])
    backbone = backbone_of(recipe)
    sets = {}
    for item in arguments.samples:
        name, _, folder = item.partition("=")
        sets[name] = drawn_images(folder)
    number = min(len(images) for images, _ in sets.values())
    sets = {name: (images[:number], labels[:number]) for name, (images, labels) in sets.items()}
    sets["real test"] = real_images(recipe, arguments.test, number)
    if recipe.autoencoder.checkpoint and recipe.pixel_decoder.checkpoint:
        images, labels = sets["real test"]
        sets["real test, rebuilt"] = (rebuilt_images(recipe, backbone, images), labels)
    train_images, train_labels = real_images(recipe, arguments.train, arguments.train_images)
    train_tokens = class_tokens(backbone, train_images)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(train_tokens, train_labels)
    tokens = {name: class_tokens(backbone, images) for name, (images, _) in sets.items()}
    scores = {}
    for name, (_, labels) in sets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            distance = frechet_of_features(tokens[name], train_tokens[:number])
        accuracy = float(probe.score(tokens[name], labels))
        scores[name] = {"accuracy": accuracy, "frechet": distance, "images": number}
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "scores.json").write_text(json.dumps(scores, indent=1))
    drawn = {n: (i, tokens[n]) for n, (i, _) in sets.items() if not n.startswith("real")}
    figure = neighbours_figure(drawn, (train_images, train_tokens))
    (output / "neighbours.png").write_bytes(figure)
    chance = 1 / len(set(train_labels.tolist()))
    print(
        f"{describe()}\n{number} images each; probe on {len(train_images)}; chance {chance:.3f}\n"
    )
    print("| images | class accuracy | Fréchet distance to training images |\n|---|---|---|")
    for name, values in scores.items():
        print(f"| {name} | {values['accuracy']:.3f} | {values['frechet']:.1f} |")


if __name__ == "__main__":
    main()
