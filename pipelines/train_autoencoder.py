"""`fae train autoencoder`: train the FAE of arXiv 2512.07829 on a frozen backbone's features, under Ray Train.

The run's folder, STORAGE/RUN, holds recipe.yaml, plan.parquet (the images as first listed), feature_stats.json,
checkpoints/, and at the end autoencoder.safetensors and result.json. The same command again resumes, or returns.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fae_core import checkpoint
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.backbone import Backbone, load_backbone
from fae_core.figures import picture_grid, reconstruction_rows
from fae_core.latent_stats import ChannelStats
from fae_core.linear_baseline import Covariance, LinearBaseline
from pipelines import storage
from pipelines.command import run_module
from pipelines.config import Recipe, RecipeError
from pipelines.images import ImageRecord, list_images
from pipelines.ray_session import for_workers, start_ray
from pipelines.tracking import flatten, resolve_uri
from pipelines.training import (
    Batch,
    Job,
    TrainingError,
    decoded,
    fit,
    prepare_worker,
    random_flips,
    run_job,
    sample_noise,
)

MAX_VALIDATION_IMAGES = 1024
EVALUATION_BATCH = 32
FIGURE_ROWS = 4
FIGURE_TITLES = ("image", "features", "latents", "reconstruction")
ACTIVE_KL = 0.01
"""Nats per token above which a latent channel counts as active."""

OPERATIONAL_KEYS = (
    "storage",
    "output",
    "precompute.",
    "tracking.",
    "training.num_workers",
    "training.use_gpu",
    "training.cpus_per_worker",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "autoencoder.checkpoint",
)
"""What may change between a run and its resumption: nothing that the result depends on."""


@dataclass(frozen=True)
class TrainResult:
    """`checkpoint` is the address of autoencoder.safetensors; `metrics` are the last validation's."""

    checkpoint: str
    metrics: dict[str, float]


def train_autoencoder(recipe: Recipe) -> TrainResult:
    """Train, resume or, where the run is finished, return at once.

    Raises RecipeError for a run of this name with another recipe, SourceError for an unusable source, NonFiniteError.
    """
    if not recipe.run or "/" in recipe.run or recipe.run.startswith("."):
        raise RecipeError(
            f"run={recipe.run!r}: give the training run a name without slashes, run=NAME. "
            "The same name resumes it."
        )
    run_uri = storage.join(recipe.storage, recipe.run)
    claim_run(recipe, run_uri)
    result_uri = storage.join(run_uri, "result.json")
    if not storage.exists(result_uri):
        plan(recipe, run_uri)
        start_ray()
        values = for_workers(recipe).model_dump(mode="json")
        fit(_worker, {"recipe": values, "tracking_uri": resolve_uri(recipe.tracking)}, recipe)
    metrics = json.loads(storage.read_bytes(result_uri))
    return TrainResult(storage.join(run_uri, "autoencoder.safetensors"), metrics)


def claim_run(recipe: Recipe, run_uri: str) -> None:
    """Write recipe.yaml into a new run's folder; raises RecipeError if another recipe's run has this name."""
    uri = storage.join(run_uri, "recipe.yaml")
    try:
        storage.write_once(uri, recipe.to_yaml().encode())
        return
    except FileExistsError:
        container = OmegaConf.to_container(OmegaConf.create(storage.read_bytes(uri).decode()))
    assert isinstance(container, dict)
    before = flatten({str(key): value for key, value in container.items()})
    now = flatten(recipe.model_dump(mode="json"))
    different = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(OPERATIONAL_KEYS)
    ]
    if different:
        raise RecipeError(
            f"The run {run_uri} exists with another recipe:\n  "
            + "\n  ".join(different)
            + "\nChoose another run=NAME, or give the same values."
        )


def plan(recipe: Recipe, run_uri: str) -> None:
    """List the source once; a resumed run trains on the images that were there when it began."""
    uri = storage.join(run_uri, "plan.parquet")
    if storage.exists(uri):
        return
    records = list_images(recipe.data)
    table = pa.table({"key": [r.key for r in records], "uri": [r.uri for r in records]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_plan(run_uri: str) -> list[ImageRecord]:
    """The run's images in key order."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(run_uri, "plan.parquet"))))
    return [
        ImageRecord(key, uri)
        for key, uri in zip(table["key"].to_pylist(), table["uri"].to_pylist(), strict=True)
    ]


def key_hash(key: str) -> int:
    """The first 64 bits of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def split_records(
    records: Sequence[ImageRecord], validation_fraction: float
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(training, validation) records; an image's side depends on its own key alone."""
    threshold = int(validation_fraction * 2**64)
    training = [record for record in records if key_hash(record.key) >= threshold]
    validation = [record for record in records if key_hash(record.key) < threshold]
    if not training:
        raise TrainingError(
            f"All {len(records)} images fall into the validation split. Lower data.validation_fraction "
            f"({validation_fraction}) or add images."
        )
    return training, validation


def autoencoder_config(recipe: Recipe, backbone: Backbone) -> AutoencoderConfig:
    """The recipe's autoencoder for this backbone's features."""
    section = recipe.autoencoder
    return AutoencoderConfig(
        feature_dim=backbone.dim,
        latent_dim=section.latent_dim,
        grid=backbone.grid,
        encoder_kind=section.encoder.kind,
        encoder_num_heads=section.encoder.num_heads,
        encoder_head_dim=section.encoder.head_dim,
        encoder_depth=section.encoder.depth,
        activation=section.encoder.activation,
        pre_norm=section.encoder.pre_norm,
        decoder_depth=section.decoder.depth,
        decoder_num_heads=section.decoder.num_heads,
        kl_weight=section.kl_weight,
    )


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    from ray.train.collective import barrier

    recipe = Recipe.model_validate(config["recipe"])
    run_uri = storage.join(recipe.storage, str(recipe.run))
    device = ray.train.torch.get_device()
    prepare_worker(device)
    is_first = ray.train.get_context().get_world_rank() == 0
    training, validation = split_records(read_plan(run_uri), recipe.data.validation_fraction)
    backbone = load_backbone(recipe.backbone.name, recipe.backbone.weights).to(device)
    if is_first:
        _fit_feature_statistics(training, recipe, run_uri, backbone, device)
    barrier()
    stats = ChannelStats.from_dict(json.loads(storage.read_bytes(_stats_uri(run_uri))))

    torch.manual_seed(recipe.seed)
    model = FeatureAutoencoder(autoencoder_config(recipe, backbone))
    std = np.maximum(stats.std, 1e-6)
    model.set_feature_stats(torch.from_numpy(stats.mean).float(), torch.from_numpy(std).float())
    latent_shape = (backbone.grid[0] * backbone.grid[1], recipe.autoencoder.latent_dim)

    def loss(wrapped: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images = random_flips(recipe.seed, batch) if recipe.training.flip else batch.images
        noise = sample_noise(recipe.seed, "posterior", batch, latent_shape)
        terms: dict[str, Tensor] = wrapped(backbone(images), noise)
        return terms

    held_out = None
    if validation and is_first:
        arrays = safetensors.numpy.load(storage.read_bytes(_baseline_uri(run_uri)))
        held_out = _HeldOut(validation, recipe, backbone, device, LinearBaseline(**arrays))
    metrics = run_job(Job(model, loss, held_out), recipe, run_uri, training, config["tracking_uri"])
    if is_first:
        _finish(model, recipe, backbone, run_uri, metrics)


def _finish(
    model: FeatureAutoencoder,
    recipe: Recipe,
    backbone: Backbone,
    run_uri: str,
    metrics: dict[str, float],
) -> None:
    fingerprints = {
        "backbone": f"{recipe.backbone.name}:{backbone.weights_sha256}",
        "image_size": str(recipe.image_size),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "autoencoder.safetensors"
        checkpoint.save(path, model, fingerprints)
        storage.write_bytes(storage.join(run_uri, path.name), path.read_bytes())
    # Written last: its presence says that the run is finished.
    storage.write_bytes(
        storage.join(run_uri, "result.json"), json.dumps(metrics, indent=1).encode()
    )


def _image_batches(records: Sequence[ImageRecord], recipe: Recipe) -> list[list[ImageRecord]]:
    size = EVALUATION_BATCH
    return [list(records[start : start + size]) for start in range(0, len(records), size)]


def _features(backbone: Backbone, images: Tensor, recipe: Recipe) -> Tensor:
    with torch.autocast(
        images.device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"
    ):
        return backbone(images).float()


def _stats_uri(run_uri: str) -> str:
    return storage.join(run_uri, "feature_stats.json")


def _baseline_uri(run_uri: str) -> str:
    return storage.join(run_uri, "linear_baseline.safetensors")


def _fit_feature_statistics(
    records: Sequence[ImageRecord],
    recipe: Recipe,
    run_uri: str,
    backbone: Backbone,
    device: torch.device,
) -> None:
    """Exact channel statistics, and the linear baseline, of the first `statistics_images` training images by key hash."""
    if storage.exists(_stats_uri(run_uri)):
        return
    chosen = sorted(records, key=lambda record: (key_hash(record.key), record.key))
    chosen = chosen[: recipe.training.statistics_images]
    print(f"feature statistics over {len(chosen)} images", flush=True)
    stats, covariance = ChannelStats.empty(backbone.dim), Covariance(backbone.dim)
    for images, kept, _ in decoded(_image_batches(chosen, recipe), recipe.data, recipe.image_size):
        if kept:
            features = _features(backbone, torch.from_numpy(np.array(images)).to(device), recipe)
            stats.update(features.cpu().numpy())
            covariance.update(features.cpu().numpy())
    if not stats.count:
        raise TrainingError(f"None of the first {len(chosen)} training images could be decoded.")
    baseline = covariance.fit(min(recipe.autoencoder.latent_dim, backbone.dim))
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(baseline).items()}
    storage.write_bytes(_baseline_uri(run_uri), safetensors.numpy.save(arrays))
    # Last: its presence says that both are there.
    storage.write_bytes(_stats_uri(run_uri), json.dumps(stats.to_dict()).encode())


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
        ordered = sorted(records, key=lambda record: (key_hash(record.key), record.key))
        self.records = ordered[:MAX_VALIDATION_IMAGES]
        self.recipe = recipe
        self.backbone = backbone
        self.device = device
        self.images: list[np.ndarray] | None = None

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        """Errors of the posterior's mode on the held-out images, and the figure of the first few."""
        assert isinstance(model, FeatureAutoencoder)
        if self.images is None:
            made = decoded(
                _image_batches(self.records, self.recipe), self.recipe.data, self.recipe.image_size
            )
            self.images = [np.array(images) for images, kept, _ in made if kept]
            self.baseline_metrics = self._linear_errors()
        if not self.images:
            return {}, None
        squares = cosines = 0.0
        channel_kl = torch.zeros(model.config.latent_dim, dtype=torch.float64)
        num_tokens, num_images = 0, 0
        figure: bytes | None = None
        precision = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.recipe.training.precision == "bf16"
        )
        for array in self.images:
            images = torch.from_numpy(array).to(self.device)
            features = _features(self.backbone, images, self.recipe)
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
            features = _features(self.backbone, images, self.recipe).double().cpu()
            output = torch.from_numpy(self.baseline.reconstruct(features.numpy()))
            error = (output - features) / torch.from_numpy(self.baseline.std)
            squares += error.square().mean(-1).sum().item()
            cosines += torch.cosine_similarity(output, features, dim=-1).sum().item()
            num_tokens += features.shape[0] * features.shape[1]
        if not num_tokens:
            return {}
        return {"linear_mse": squares / num_tokens, "linear_cosine": cosines / num_tokens}


def main() -> int:
    """`python -m pipelines.train_autoencoder RECIPE key=value ...`; the exit status."""

    def job(recipe: Recipe) -> dict[str, Any]:
        result = train_autoencoder(recipe)
        return {"checkpoint": result.checkpoint, **result.metrics}

    return run_module("pipelines.train_autoencoder", job)


if __name__ == "__main__":
    # Under its own name, so that Ray ships `_worker` by reference.
    from pipelines.train_autoencoder import main as _main

    sys.exit(_main())
