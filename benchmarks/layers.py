"""Feature error of a FAE and of a linear PCA of equal latent size, by `backbone.layers`.

    python -m benchmarks.layers [--layers 1 3 6 12] [--steps 150] [--crops 20]

Photographs of scikit-image, each cropped at random places and scales, are seen by DINOv2-S once
with each number of layers. The last crop of every five is held out, so a held-out crop shows a
picture of which other parts were trained on. Training is recipe `photos-dinov2s` with fewer steps,
4 images a step and the same noise and order for each number of layers. Errors are those of
standardized features: each channel's variance is 1 whatever is summed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.crops import adm_center_crop
from fae.pipelines.demo.full import write_photographs
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae_core.autoencoder import FeatureAutoencoder, autoencoder_loss
from fae_core.backbone_presets import BackboneSpec
from fae_core.linear_baseline import Covariance, LinearBaseline

BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 6, 12])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--crops", type=int, default=20, help="of each photograph")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(folder), arguments.crops)
    held_out = np.arange(len(images)) % 5 == 4
    print(f"{(~held_out).sum()} images, {held_out.sum()} held out, {arguments.steps} steps")
    print("| layers | PCA MSE | PCA cosine | FAE MSE | FAE cosine | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for layers in arguments.layers:
        started = time.monotonic()
        recipe = load_recipe("photos-dinov2s", [f"backbone.layers={layers}"])
        backbone = backbone_of(recipe)
        features = torch.cat([backbone(part) for part in torch.from_numpy(images).split(16)])
        training, validation = features[~held_out], features[held_out]
        baseline = fit_baseline(training, recipe.autoencoder.latent_dim)
        rebuilt = torch.from_numpy(baseline.reconstruct(validation.numpy())).float()
        linear = errors(baseline, validation, rebuilt)
        model = train(recipe, backbone.spec, baseline, training, arguments.steps)
        with torch.no_grad():
            rebuilt = model.decode(model.encode(validation).mode())
        learned = errors(baseline, validation, rebuilt)
        row = [f"{value:.4f}" for value in (*linear, *learned)]
        print(f"| {layers} | {' | '.join(row)} | {time.monotonic() - started:.0f} |", flush=True)


def photographs(folder: Path, crops: int) -> np.ndarray:
    """uint8 crops [n, 256, 256, 3] of the demo's photographs, `crops` of each."""
    write_photographs(folder)
    files = sorted(folder.glob("*/*.jpg"))
    chosen = [path for path in files if int(path.stem) < crops]
    return np.stack([adm_center_crop(Image.open(path).convert("RGB"), 256) for path in chosen])


def fit_baseline(features: Tensor, num_components: int) -> LinearBaseline:
    """The PCA of features [n, N, D]."""
    covariance = Covariance(features.shape[-1])
    covariance.update(features.numpy())
    return covariance.fit(num_components)


def train(
    recipe: Recipe, spec: BackboneSpec, baseline: LinearBaseline, features: Tensor, steps: int
) -> FeatureAutoencoder:
    """The recipe's autoencoder after `steps` steps on features [n, N, D]."""
    torch.manual_seed(recipe.seed)
    model = build_autoencoder(recipe.autoencoder, spec)
    model.set_feature_stats(torch.from_numpy(baseline.mean), torch.from_numpy(baseline.std))
    section = recipe.autoencoder.training
    optimizer = torch.optim.AdamW(
        model.parameters(), section.learning_rate, section.betas, weight_decay=section.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, section.learning_rate, total_steps=steps, pct_start=0.1
    )
    draws = torch.Generator().manual_seed(recipe.seed)
    for _ in range(steps):
        batch = features[torch.randint(len(features), (BATCH,), generator=draws)]
        shape = (BATCH, features.shape[1], recipe.autoencoder.latent_dim)
        loss = autoencoder_loss(model, batch, torch.randn(shape, generator=draws))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def errors(baseline: LinearBaseline, features: Tensor, rebuilt: Tensor) -> tuple[float, float]:
    """Mean squared error of standardized features, and mean cosine of the raw ones."""
    std = torch.from_numpy(baseline.std).float()
    mse = ((features - rebuilt) / std).square().mean()
    return float(mse), float(torch.cosine_similarity(features, rebuilt, dim=-1).mean())


if __name__ == "__main__":
    main()
