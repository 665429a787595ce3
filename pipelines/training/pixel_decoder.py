"""`fae train pixel-decoder`: features to pixels (arXiv 2512.07829, section 4.2).

Stage `noisy` learns on the frozen backbone's features with Gaussian noise. It needs no autoencoder,
so it runs beside FAE's training. Stage `finetune` starts from its result and learns on the features
that the autoencoder rebuilds. The adversary and its optimizer are part of the run's checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.autoencoder import FeatureAutoencoder
from fae_core.backbone import Backbone
from fae_core.figures import picture_grid
from fae_core.losses import noise_scale
from fae_core.metrics.reconstruction import WINDOW, psnr, ssim
from fae_core.pixel_decoder import PixelDecoder, from_uint8, to_uint8
from fae_core.precision import autocast

from ..config import Recipe, RecipeError
from ..data.records import split_records
from ..networks import (
    autoencoder_of,
    backbone_fingerprints,
    backbone_of,
    check_fingerprints,
    features_of,
    load_checkpoint,
)
from ..networks.untrained import backbone_spec, build_pixel_decoder, pixel_decoder_config
from ..runtime.places import check_places
from . import run_folder
from .feature_cache import training_features
from .feature_statistics import fit_statistics, read_statistics
from .image_feed import image_batches
from .job import check_batch
from .launch import enter_worker, launch
from .loop import run_job
from .pixel_objective import Objective, make_adversary, pixel_decoder_job

MAX_VALIDATION_IMAGES = 512
FIGURE_ROWS = 6
FIGURE_TITLES = ("original", "from features", "from rebuilt features")


def train_pixel_decoder(recipe: Recipe, callbacks: Sequence[Any] = ()) -> run_folder.TrainResult:
    """Train, resume or, where the run is finished, return at once; `callbacks` are Ray Train's.

    Raises RecipeError, TrainingError, SourceError, CheckpointError for parts that do not belong
    together, NonFiniteError.
    """
    run_uri = run_folder.run_folder(recipe)
    section = recipe.pixel_decoder
    if section.stage == "finetune" and not (section.start_from and recipe.autoencoder.checkpoint):
        raise RecipeError(
            "pixel_decoder.stage=finetune needs pixel_decoder.start_from=FIRST_STAGE and "
            "autoencoder.checkpoint=AUTOENCODER (both .safetensors)."
        )
    check_settings(recipe)
    read = ("data.path", "backbone.weights", "pixel_decoder.start_from", "autoencoder.checkpoint")
    check_places(recipe, ("storage", *read))
    recipe = run_folder.settle_precision(recipe, "pixel_decoder", run_uri)
    run_folder.begin_on_images(recipe, run_uri, ("data", "backbone", "pixel_decoder"))
    if run_folder.result(run_uri) is None:
        account = run_folder.read_account(run_uri)
        launch(_worker, recipe, section.training, callbacks, account)
    return run_folder.train_result(run_uri, "pixel_decoder")


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError or TrainingError for settings that no pixel decoder can train with."""
    section, size = recipe.pixel_decoder, recipe.image_size
    check_batch(section.training)
    with torch.device("meta"):
        build_pixel_decoder(section, backbone_spec(recipe), size)
    if size < WINDOW:
        raise RecipeError(
            f"image_size={size}: a pixel decoder is validated by SSIM, whose window is {WINDOW} px."
        )


def _worker(config: dict[str, Any]) -> None:
    from ray.train.collective import barrier

    worker = enter_worker(config, "pixel_decoder")
    recipe, run_uri, section = worker.recipe, worker.run_uri, worker.recipe.pixel_decoder
    fraction = recipe.data.validation_fraction
    records, held_out = split_records(run_folder.read_plan(run_uri), fraction)
    backbone = backbone_of(recipe).to(worker.device)
    marks = backbone_fingerprints(recipe, backbone)
    autoencoder: FeatureAutoencoder | None = None
    if recipe.autoencoder.checkpoint:
        loaded = autoencoder_of(recipe, backbone)
        marks["autoencoder"] = loaded.weights_sha256
        autoencoder = loaded.module.to(worker.device).requires_grad_(False)
    run_folder.claim_networks(run_uri, marks)
    training = training_features(recipe, section, records, backbone)
    with_latents = section.stage == "finetune" and section.latent_noise > 0.0
    if worker.is_first:
        features = training.first(section.statistics_images)
        fit_statistics(features, backbone.dim, run_uri)
        if with_latents and autoencoder is not None:
            latents = _latents(autoencoder, training.first(section.statistics_images))
            fit_statistics(latents, autoencoder.config.latent_dim, run_uri, of="latent")
    barrier()
    mean, std = read_statistics(run_uri)
    torch.manual_seed(recipe.seed)
    model = starting_model(recipe, backbone, mean, std)
    adversary = make_adversary(section.losses, backbone)
    # Statistics per channel give the features' root mean square without looking at them again.
    rms = float((mean.square() + std.square()).mean().sqrt())
    noise_std: float | Tensor = noise_scale(section.noise_sigma, rms, section.noise_reference_rms)
    if with_latents:
        std_of_latents = read_statistics(run_uri, of="latent")[1]
        noise_std = section.latent_noise * std_of_latents.to(worker.device)
    objective = Objective(section, recipe.seed, backbone, autoencoder, adversary, noise_std)
    validation = None
    if held_out and worker.is_first:
        images = functools.partial(
            image_batches, held_out[:MAX_VALIDATION_IMAGES], recipe.data, recipe.image_size
        )
        validation = _Validation(images, objective)
    run_job(
        worker,
        pixel_decoder_job(model, objective),
        training.feed,
        validation,
        functools.partial(backbone_fingerprints, recipe, backbone),
    )


@torch.no_grad()
def _latents(
    autoencoder: FeatureAutoencoder, features: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """The latents [n, N, C] of features [n, N, D], batch by batch."""
    device = autoencoder.feature_mean.device
    for batch in features:
        yield autoencoder.encode(torch.from_numpy(batch).to(device)).mode().cpu().numpy()


def starting_model(recipe: Recipe, backbone: Backbone, mean: Tensor, std: Tensor) -> PixelDecoder:
    """The network before the first step: untrained, or in stage finetune the one at `start_from`.

    `mean` and `std` [D] are of the features. Raises CheckpointError and RecipeError where a network
    to start from is another backbone's or not of the recipe's shape.
    """
    section, spec = recipe.pixel_decoder, backbone.spec
    if section.stage == "noisy" or section.start_from is None:
        model = build_pixel_decoder(section, spec, recipe.image_size)
        model.set_feature_stats(mean, std)
        return model
    uri, config = section.start_from, pixel_decoder_config(section, spec, recipe.image_size)
    loaded = load_checkpoint(uri, "pixel_decoder")
    check_fingerprints(uri, loaded, backbone_fingerprints(recipe, backbone))
    if loaded.module.config != config:
        raise RecipeError(f"{uri} is {loaded.module.config}; the recipe wants {config}.")
    decoder: PixelDecoder = loaded.module.train()
    return decoder


class _Validation:
    """PSNR, SSIM and perceptual distances on held-out images: from true and from rebuilt features.

    `images` gives them in batches uint8 [n, S, S, 3]; they are decoded once, and kept.
    """

    def __init__(self, images: Callable[[], Iterator[np.ndarray]], objective: Objective) -> None:
        self.decode = images
        self.objective = objective

    @functools.cached_property
    def images(self) -> list[np.ndarray]:
        return list(self.decode())

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        """Means over the images, and a figure of the first few; nothing where all are damaged."""
        backbone, autoencoder = self.objective.backbone, self.objective.autoencoder
        device, precision = backbone.mean.device, self.objective.section.training.precision
        sums: dict[str, float] = {}
        figure: bytes | None = None
        for array in self.images:
            images = torch.from_numpy(array).to(device)
            features = features_of(backbone, images, precision)
            target = from_uint8(images)
            sources = {"": features}
            if autoencoder is not None:
                sources["rebuilt_"] = autoencoder.decode(autoencoder.encode(features).mode())
            shown: list[np.ndarray] = [array]
            for prefix, source in sources.items():
                with autocast(precision, device):
                    output = model(source).clamp(0.0, 1.0)
                for name, value in self._scores(output, target).items():
                    sums[prefix + name] = sums.get(prefix + name, 0.0) + value
                shown.append(to_uint8(output).cpu().numpy())
            if figure is None:
                rows = [list(row) for row in zip(*shown, strict=True)][:FIGURE_ROWS]
                figure = picture_grid(rows, FIGURE_TITLES[: len(shown)])
        count = sum(map(len, self.images))
        metrics = {name: value / count for name, value in sums.items()}
        return metrics | {"num_images": float(count)}, figure

    def _scores(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """Sums over the batch, of pictures [B, 3, S, S] in [0, 1]."""
        scores = {"psnr": psnr(output, target), "ssim": ssim(output, target)}
        if self.objective.by_backbone is not None:
            scores["backbone_distance"] = self.objective.by_backbone(output, target)
        if self.objective.lpips is not None:
            scores["lpips"] = self.objective.lpips(output * 2 - 1, target * 2 - 1)
        return {name: float(values.sum()) for name, values in scores.items()}
