"""`fae train autoencoder`: train the FAE of arXiv 2512.07829 on a frozen backbone's features, under Ray Train.

The run's folder, STORAGE/RUN, holds recipe.yaml, plan.parquet (the images as first listed), feature_stats.json,
checkpoints/, and at the end autoencoder.safetensors and result.json. The same command again resumes, or returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.autoencoder import FeatureAutoencoder
from fae_core.backbone import Backbone
from fae_core.figures import picture_grid, reconstruction_rows
from fae_core.linear_baseline import LinearBaseline

from ..config import Recipe, with_absolute_paths
from ..data.decoding import decoded
from ..data.records import ImageRecord, split_records
from ..networks import backbone_fingerprints, backbone_of, features_of
from ..networks.untrained import build_autoencoder
from ..runtime.session import start_ray
from ..storage import paths
from . import run_folder
from .batches import Batch, random_flips, sample_noise
from .feature_statistics import fit_statistics, image_batches, read_baseline, read_statistics
from .image_feed import image_feed
from .job import Job
from .launch import TrainResult, fit, prepare_worker
from .loop import run_job
from .tracking import resolve_uri

MAX_VALIDATION_IMAGES = 1024
FIGURE_ROWS = 4
FIGURE_TITLES = ("image", "features", "latents", "reconstruction")
ACTIVE_KL = 0.01
"""Nats per token above which a latent channel counts as active."""


def train_autoencoder(recipe: Recipe, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Train, resume or, where the run is finished, return at once; `callbacks` are Ray Train's.

    Raises RecipeError for a run of this name with another recipe, SourceError for an unusable source, NonFiniteError.
    """
    run_uri = run_folder.run_folder(recipe)
    run_folder.claim_run(recipe, run_uri, ("data", "backbone", "autoencoder"))
    if run_folder.result(run_uri) is None:
        run_folder.plan(recipe, run_uri)
        start_ray()
        values = with_absolute_paths(recipe).model_dump(mode="json")
        config = {"recipe": values, "tracking_uri": resolve_uri(recipe.tracking)}
        fit(_worker, config, recipe, recipe.autoencoder.training, callbacks)
    metrics = run_folder.result(run_uri) or {}
    return TrainResult(paths.join(run_uri, "autoencoder.safetensors"), metrics)


def autoencoder_loss(
    recipe: Recipe, backbone: Backbone, model: nn.Module, batch: Batch
) -> dict[str, Tensor]:
    """The loss terms of one micro-batch of images; `model` may be wrapped for data parallelism."""
    images = random_flips(recipe.seed, batch) if recipe.autoencoder.flip else batch["images"]
    latent_shape = (backbone.grid[0] * backbone.grid[1], recipe.autoencoder.latent_dim)
    noise = sample_noise(recipe.seed, "posterior", batch, latent_shape)
    terms: dict[str, Tensor] = model(backbone(images), noise)
    return terms


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    from ray.train.collective import barrier

    recipe = Recipe.model_validate(config["recipe"])
    run_uri = paths.join(recipe.storage, str(recipe.run))
    device = ray.train.torch.get_device()
    prepare_worker(device, recipe.autoencoder.training)
    is_first = ray.train.get_context().get_world_rank() == 0
    training, validation = split_records(
        run_folder.read_plan(run_uri), recipe.data.validation_fraction
    )
    backbone = backbone_of(recipe).to(device)
    section = recipe.autoencoder
    if is_first:
        fit_statistics(
            training[: section.statistics_images],
            recipe,
            run_uri,
            backbone,
            section.training.precision,
            num_components=section.latent_dim,
        )
    barrier()
    stats = read_statistics(run_uri)

    torch.manual_seed(recipe.seed)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    model.set_feature_stats(*stats)

    def loss(wrapped: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return autoencoder_loss(recipe, backbone, wrapped, batch)

    held_out = None
    if validation and is_first:
        held_out = _HeldOut(validation, recipe, backbone, device, read_baseline(run_uri))
    feed = image_feed(training, recipe.data, recipe.image_size, recipe.seed, section.training)
    job = Job(model, feed, loss, held_out, frozen={"backbone": backbone})
    trained, metrics = run_job(job, section.training, recipe, run_uri, config["tracking_uri"])
    if is_first:
        fingerprints = backbone_fingerprints(recipe, backbone)
        run_folder.finish(run_uri, "autoencoder", trained, fingerprints, metrics)


class _HeldOut:
    """Validation on the held-out images (at most 1024, by key hash), decoded once and kept as uint8."""

    def __init__(
        self,
        records: Sequence[ImageRecord],
        recipe: Recipe,
        backbone: Backbone,
        device: torch.device,
        baseline: LinearBaseline,
    ) -> None:
        self.baseline = baseline
        self.baseline_metrics: dict[str, float] = {}
        self.records = records[:MAX_VALIDATION_IMAGES]
        self.recipe = recipe
        self.precision = recipe.autoencoder.training.precision
        self.backbone = backbone
        self.device = device
        self.images: list[np.ndarray] | None = None

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        """Errors of the posterior's mode on the held-out images, and the figure of the first few."""
        assert isinstance(model, FeatureAutoencoder)
        if self.images is None:
            made = decoded(image_batches(self.records), self.recipe.data, self.recipe.image_size)
            self.images = [np.array(images) for images, kept, _ in made if kept]
            self.baseline_metrics = self._linear_errors()
        if not self.images:
            return {}, None
        squares = cosines = 0.0
        channel_kl = torch.zeros(model.config.latent_dim, dtype=torch.float64)
        num_tokens, num_images = 0, 0
        figure: bytes | None = None
        precision = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.precision == "bf16",
        )
        for array in self.images:
            images = torch.from_numpy(array).to(self.device)
            features = features_of(self.backbone, images, self.precision)
            with precision:
                posterior = model.encode(features)
                latents = posterior.mode()
                output = model.decode(latents).float()
            error = (output - features) / model.feature_std
            squares += error.square().mean(-1).double().sum().item()
            cosines += torch.cosine_similarity(output, features, dim=-1).double().sum().item()
            channel_kl += posterior.kl().double().sum(dim=(0, 1)).cpu()
            num_tokens += features.shape[0] * features.shape[1]
            num_images += len(array)
            if figure is None:
                first, codes, rebuilt = (
                    t[:FIGURE_ROWS].float().cpu().numpy() for t in (features, latents, output)
                )
                rows = reconstruction_rows(
                    array[:FIGURE_ROWS], first, codes, rebuilt, self.backbone.grid
                )
                figure = picture_grid(rows, FIGURE_TITLES)
        active = int((channel_kl / num_tokens > ACTIVE_KL).sum())
        metrics = {
            "mse": squares / num_tokens,
            "cosine": cosines / num_tokens,
            "kl": float(channel_kl.sum()) / num_images,
            "active_channels": float(active),
            "num_images": float(num_images),
        }
        return metrics | self.baseline_metrics, figure

    def _linear_errors(self) -> dict[str, float]:
        """The same errors of linear PCA with as many components as the latent has channels."""
        squares = cosines = 0.0
        num_tokens = 0
        for array in self.images or []:
            images = torch.from_numpy(array).to(self.device)
            features = features_of(self.backbone, images, self.precision).double().cpu()
            output = torch.from_numpy(self.baseline.reconstruct(features.numpy()))
            error = (output - features) / torch.from_numpy(self.baseline.std)
            squares += error.square().mean(-1).sum().item()
            cosines += torch.cosine_similarity(output, features, dim=-1).sum().item()
            num_tokens += features.shape[0] * features.shape[1]
        if not num_tokens:
            return {}
        return {"linear_mse": squares / num_tokens, "linear_cosine": cosines / num_tokens}
