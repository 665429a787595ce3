"""`fae train autoencoder`: the FAE of arXiv 2512.07829 on a frozen backbone's features.

The run's folder, STORAGE/RUN, holds recipe.yaml, plan.parquet (the images as first listed),
feature_stats.json, checkpoints/, and at the end autoencoder.safetensors and result.json. The same
command again resumes the run, or returns its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.autoencoder import FeatureAutoencoder
from fae_core.backbone import Backbone
from fae_core.figures import picture_grid, reconstruction_rows
from fae_core.linear_baseline import LinearBaseline
from fae_core.precision import autocast

from ..config import Recipe
from ..config.sections import AutoencoderSection
from ..data.records import split_records
from ..networks import backbone_fingerprints, backbone_of, features_of
from ..networks.untrained import backbone_spec, build_autoencoder, build_backbone
from ..runtime.places import check_places
from . import run_folder
from .batches import Batch, images_and_features, sample_noise
from .feature_cache import training_features
from .feature_statistics import fit_statistics, read_baseline, read_statistics
from .image_feed import blank_images, image_batches
from .job import Job, UntrainedJob, check_batch
from .launch import enter_worker, launch
from .loop import run_job

MAX_VALIDATION_IMAGES = 1024
FIGURE_ROWS = 4
FIGURE_TITLES = ("image", "features", "latents", "reconstruction")
ACTIVE_KL = 0.01
"""Nats per token above which a latent channel counts as active."""


def train_autoencoder(recipe: Recipe, callbacks: Sequence[Any] = ()) -> run_folder.TrainResult:
    """Train, resume or, where the run is finished, return at once; `callbacks` are Ray Train's.

    Raises RecipeError for a run of this name with another recipe or a network that there cannot be,
    TrainingError, SourceError for an unusable source, NonFiniteError.
    """
    run_uri = run_folder.run_folder(recipe)
    check_settings(recipe)
    check_places(recipe, ("storage", "data.path", "backbone.weights"))
    recipe = run_folder.settle_precision(recipe, "autoencoder", run_uri)
    run_folder.begin_on_images(recipe, run_uri, ("data", "backbone", "autoencoder"))
    if run_folder.result(run_uri) is None:
        account = run_folder.read_account(run_uri)
        launch(_worker, recipe, recipe.autoencoder.training, callbacks, account)
    return run_folder.train_result(run_uri, "autoencoder")


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError or TrainingError for settings that no autoencoder can be trained with."""
    training = recipe.autoencoder.training
    check_batch(training)
    with torch.device("meta"):
        build_autoencoder(recipe.autoencoder, backbone_spec(recipe))


def autoencoder_loss(
    section: AutoencoderSection, seed: int, backbone: Backbone, model: nn.Module, batch: Batch
) -> dict[str, Tensor]:
    """The loss terms of one micro-batch of images (arXiv 2512.07829, eq. 4.1)."""
    _, features = images_and_features(seed, batch, section.flip, backbone)
    latent_shape = (backbone.grid[0] * backbone.grid[1], section.latent_dim)
    noise = sample_noise(seed, "posterior", batch, latent_shape)
    terms: dict[str, Tensor] = model(features, noise)
    return terms


def autoencoder_job(
    section: AutoencoderSection, seed: int, backbone: Backbone, model: FeatureAutoencoder
) -> Job:
    """The job that trains `model` on what `backbone` sees."""
    loss = functools.partial(autoencoder_loss, section, seed, backbone)
    return Job(model, loss, frozen={"backbone": backbone})


def untrained_job(recipe: Recipe) -> UntrainedJob:
    """The recipe's job with initial weights, and its blank batches of any number of images.

    requirements.py measures them by their shapes.
    """
    backbone = build_backbone(recipe.backbone)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    job = autoencoder_job(recipe.autoencoder, recipe.seed, backbone, model)
    return job, functools.partial(blank_images, size=recipe.image_size)


def _worker(config: dict[str, Any]) -> None:
    from ray.train.collective import barrier

    worker = enter_worker(config, "autoencoder")
    recipe, run_uri, section = worker.recipe, worker.run_uri, worker.recipe.autoencoder
    fraction = recipe.data.validation_fraction
    records, held_out = split_records(run_folder.read_plan(run_uri), fraction)
    backbone = backbone_of(recipe).to(worker.device)
    run_folder.claim_networks(run_uri, backbone_fingerprints(recipe, backbone))
    training = training_features(recipe, section, records, backbone)
    if worker.is_first:
        features = training.first(section.statistics_images)
        fit_statistics(features, backbone.dim, run_uri, num_components=section.latent_dim)
    barrier()
    torch.manual_seed(recipe.seed)
    model = build_autoencoder(section, backbone.spec)
    model.set_feature_stats(*read_statistics(run_uri))
    validation = None
    if held_out and worker.is_first:
        images = functools.partial(
            image_batches, held_out[:MAX_VALIDATION_IMAGES], recipe.data, recipe.image_size
        )
        precision = section.training.precision
        validation = _Validation(images, backbone, read_baseline(run_uri), precision)
    run_job(
        worker,
        autoencoder_job(section, recipe.seed, backbone, model),
        training.feed,
        validation,
        functools.partial(backbone_fingerprints, recipe, backbone),
    )


class _Errors:
    """Sums over tokens of the squared error of standardized features and of their cosine."""

    def __init__(self, std: Tensor) -> None:
        self.std = std
        self.squares = self.cosines = 0.0
        self.num_tokens = 0

    def add(self, output: Tensor, features: Tensor) -> None:
        """Count rebuilt features against the true ones, each [B, N, D] and raw."""
        error = (output - features) / self.std
        self.squares += error.square().mean(-1).double().sum().item()
        self.cosines += torch.cosine_similarity(output, features, dim=-1).double().sum().item()
        self.num_tokens += features.shape[0] * features.shape[1]

    def means(self, prefix: str = "") -> dict[str, float]:
        """Mean `mse` over tokens and channels, and mean `cosine` over tokens."""
        return {
            f"{prefix}mse": self.squares / self.num_tokens,
            f"{prefix}cosine": self.cosines / self.num_tokens,
        }


class _Validation:
    """Errors of the posterior's mode on held-out images, beside those of linear PCA.

    `images` gives them in batches uint8 [n, S, S, 3]; they are decoded once, and kept.
    """

    def __init__(
        self,
        images: Callable[[], Iterator[np.ndarray]],
        backbone: Backbone,
        baseline: LinearBaseline,
        precision: str,
    ) -> None:
        self.decode = images
        self.backbone = backbone
        self.baseline = baseline
        self.precision = precision
        self.device = backbone.mean.device

    @functools.cached_property
    def images(self) -> list[np.ndarray]:
        return list(self.decode())

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        """The metrics, and a figure of the first few images; nothing where all are damaged."""
        assert isinstance(model, FeatureAutoencoder)
        if not self.images:
            return {}, None
        errors = _Errors(model.feature_std)
        channel_kl = torch.zeros(model.config.latent_dim, dtype=torch.float64)
        figure: bytes | None = None
        for array in self.images:
            features = self._features(array)
            with autocast(self.precision, self.device):
                posterior = model.encode(features)
                latents = posterior.mode()
                output = model.decode(latents).float()
            errors.add(output, features)
            channel_kl += posterior.kl().double().sum(dim=(0, 1)).cpu()
            figure = figure or self._figure(array, features, latents, output)
        active = int((channel_kl / errors.num_tokens > ACTIVE_KL).sum())
        num_images = sum(map(len, self.images))
        metrics = {
            **errors.means(),
            "kl": float(channel_kl.sum()) / num_images,
            "active_channels": float(active),
            "num_images": float(num_images),
        }
        return metrics | self.linear_errors, figure

    @functools.cached_property
    def linear_errors(self) -> dict[str, float]:
        """The errors of linear PCA with as many components as the latent has channels."""
        errors = _Errors(torch.from_numpy(self.baseline.std))
        for array in self.images:
            features = self._features(array).double().cpu()
            errors.add(torch.from_numpy(self.baseline.reconstruct(features.numpy())), features)
        return errors.means("linear_")

    def _features(self, array: np.ndarray) -> Tensor:
        images = torch.from_numpy(array).to(self.device)
        return features_of(self.backbone, images, self.precision)

    def _figure(self, array: np.ndarray, *stages: Tensor) -> bytes:
        """PNG of images uint8 [n, S, S, 3] and their features, latents and rebuilt features."""
        features, latents, rebuilt = (t[:FIGURE_ROWS].float().cpu().numpy() for t in stages)
        images = array[:FIGURE_ROWS]
        rows = reconstruction_rows(images, features, latents, rebuilt, self.backbone.grid)
        return picture_grid(rows, FIGURE_TITLES)
