"""What `backbone.layers` does to a FAE: feature errors, pictures and probes.

    python -m benchmarks.layers TRAINING TEST [--layers 1 3 6 12] [--images 3000] [--test 1000]

TRAINING and TEST are sources of labelled images, as `data.path` takes them. Each number of layers
has the same images, batches, noise and steps, and networks of recipe `sweep-fashion`: an
autoencoder of 16 dimensions, a pixel decoder that trains on true features and then on the features
that this autoencoder rebuilds, and the probes. Printed are means over TEST. Errors are those of
standardized features: each channel's variance is 1 whatever is summed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.environment import describe, run
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.data.reading import load_crops
from fae.pipelines.data.sources import list_images
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import build_autoencoder, build_pixel_decoder
from fae_core.autoencoder import FeatureAutoencoder, autoencoder_loss
from fae_core.backbone import Backbone
from fae_core.linear_baseline import Covariance, LinearBaseline
from fae_core.losses import pixel_error
from fae_core.metrics.probes import LinearProbe, knn_accuracy
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.pixel_decoder import PixelDecoder, from_uint8

RECIPE = "sweep-fashion"
BATCH, AT_ONCE = 16, 64
NEIGHBORS, REGULARIZATION = 20, (0.01, 0.1, 1.0)
COLUMNS = (
    "PCA MSE | PCA cosine | FAE MSE | FAE cosine | PSNR, SSIM of true features | of rebuilt ones "
    "| k-NN, linear of true features | of rebuilt ones | of latents | seconds"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training")
    parser.add_argument("test")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 6, 12])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--autoencoder-steps", type=int, default=400)
    parser.add_argument("--decoder-steps", type=int, default=500)
    parser.add_argument("--finetune-steps", type=int, default=200)
    options = parser.parse_args()
    print(describe())
    print(f"| layers | {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 2)}", flush=True)
    for layers in options.layers:
        started = time.monotonic()
        recipe = load_recipe(RECIPE, [f"backbone.layers={layers}"])
        train = Images(recipe, options.training, options.images)
        test = Images(recipe, options.test, options.test_images)
        cells = measure(recipe, train, test, options)
        seconds = time.monotonic() - started
        print(f"| {layers} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


class Images:
    """The first images of a source: pictures [n, 3, S, S] in [0, 1], features and labels."""

    def __init__(self, recipe: Recipe, path: str, limit: int) -> None:
        data = recipe.data.model_copy(update={"path": path})
        records = list_images(data)[:limit]
        array, kept, _ = load_crops(records, recipe.image_size, data)
        images = torch.from_numpy(array)
        self.labels = np.array([records[index].label for index in kept])
        self.pictures = from_uint8(images)
        self.backbone: Backbone = backbone_of(recipe)
        self.features = batched(self.backbone, images)


def measure(recipe: Recipe, train: Images, test: Images, steps: argparse.Namespace) -> list[str]:
    """The cells of one row after that of the number of layers."""
    baseline = fit_baseline(train.features, recipe.autoencoder.latent_dim)
    linear = torch.from_numpy(baseline.reconstruct(test.features.numpy())).float()
    cells = [f"{value:.3f}" for value in errors(baseline, test.features, linear)]
    model = train_autoencoder(recipe, train, baseline, steps.autoencoder_steps)
    latents = [batched(lambda x: model.encode(x).mode(), x.features) for x in (train, test)]
    rebuilt = [batched(model.decode, latent) for latent in latents]
    cells += [f"{value:.3f}" for value in errors(baseline, test.features, rebuilt[1])]
    decoder = build_pixel_decoder(recipe.pixel_decoder, train.backbone.spec, recipe.image_size)
    decoder.set_feature_stats(*statistics(baseline))
    section = recipe.pixel_decoder.training
    for features, test_features, number in (
        (train.features, test.features, steps.decoder_steps),
        (rebuilt[0], rebuilt[1], steps.finetune_steps),
    ):
        train_decoder(decoder, section, features, train.pictures, number, recipe.seed)
        pictures = batched(decoder, test_features).clamp(0.0, 1.0)
        scores = (psnr(pictures, test.pictures), ssim(pictures, test.pictures))
        cells.append("{:.2f} dB, {:.3f}".format(*(float(score.mean()) for score in scores)))
    for first, second in ((train.features, test.features), rebuilt, latents):
        vectors = [part.mean(1).numpy() for part in (first, second)]
        nearest = knn_accuracy(vectors[0], train.labels, vectors[1], test.labels, NEIGHBORS)
        probe = LinearProbe.fit(vectors[0], train.labels, REGULARIZATION)
        found = nearest.value, probe.accuracy(vectors[1], test.labels).value
        cells.append("{:.1%}, {:.1%}".format(*found))
    return cells


def fit_baseline(features: Tensor, num_components: int) -> LinearBaseline:
    """The PCA of features [n, N, D]."""
    covariance = Covariance(features.shape[-1])
    for part in features.split(AT_ONCE):
        covariance.update(part.numpy())
    return covariance.fit(num_components)


def statistics(baseline: LinearBaseline) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(baseline.mean), torch.from_numpy(baseline.std)


def train_autoencoder(
    recipe: Recipe, images: Images, baseline: LinearBaseline, num_steps: int
) -> FeatureAutoencoder:
    torch.manual_seed(recipe.seed)
    model = build_autoencoder(recipe.autoencoder, images.backbone.spec)
    model.set_feature_stats(*statistics(baseline))
    noise = torch.Generator().manual_seed(recipe.seed)
    shape = (BATCH, images.features.shape[1], recipe.autoencoder.latent_dim)
    for chosen in steps_of(
        model, recipe.autoencoder.training, len(images.features), num_steps, recipe.seed
    ):
        loss = autoencoder_loss(model, images.features[chosen], torch.randn(shape, generator=noise))
        loss["loss"].backward()
    return model.eval()


def train_decoder(
    decoder: PixelDecoder,
    section: TrainingSection,
    features: Tensor,
    pictures: Tensor,
    num_steps: int,
    seed: int,
) -> None:
    decoder.train()
    for chosen in steps_of(decoder, section, len(features), num_steps, seed):
        pixel_error(decoder(features[chosen]), pictures[chosen], "l1").backward()
    decoder.eval()


def steps_of(
    model: nn.Module, section: TrainingSection, num_images: int, num_steps: int, seed: int
) -> Iterator[Tensor]:
    """The images of each step; the gradients that a step leaves in `model` are applied after it."""
    optimizer = torch.optim.AdamW(
        model.parameters(), section.learning_rate, section.betas, weight_decay=section.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, section.learning_rate, total_steps=num_steps, pct_start=0.1
    )
    draws = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        optimizer.zero_grad()
        yield torch.randint(num_images, (BATCH,), generator=draws)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def errors(baseline: LinearBaseline, features: Tensor, rebuilt: Tensor) -> tuple[float, float]:
    """Mean squared error of standardized features, and mean cosine of the raw ones."""
    std = torch.from_numpy(baseline.std).float()
    mse = ((features - rebuilt) / std).square().mean()
    return float(mse), float(torch.cosine_similarity(features, rebuilt, dim=-1).mean())


@torch.no_grad()
def batched(network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([network(part) for part in inputs.split(AT_ONCE)])


if __name__ == "__main__":
    run(main)
