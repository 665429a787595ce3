"""`fae train pixel-decoder`: features to pixels, under Ray Train (arXiv 2512.07829, section 4.2).

Stage `noisy` learns on the frozen backbone's features with Gaussian noise and needs no autoencoder, so it runs beside
FAE's training. Stage `finetune` starts from its checkpoint and learns on the features that the autoencoder rebuilds.
The adversary and its optimizer are part of the run's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fae_core.backbone import Backbone
from fae_core.discriminator import Discriminator, augment, discriminator_loss
from fae_core.draws import uniform_draws
from fae_core.figures import picture_grid
from fae_core.losses import (
    BackboneDistance,
    adaptive_weight,
    lpips_distance,
    noise_scale,
    pixel_error,
)
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.pixel_decoder import PixelDecoder, from_uint8, to_uint8

from ..config import Recipe, RecipeError, with_absolute_paths
from ..data.decoding import decoded
from ..data.records import ImageRecord, split_records
from ..networks import (
    autoencoder_of,
    backbone_fingerprints,
    backbone_of,
    check_fingerprints,
    features_of,
    load_checkpoint,
)
from ..networks.untrained import build_pixel_decoder, pixel_decoder_config
from ..runtime.session import start_ray
from ..storage import paths
from . import run_folder
from .batches import Batch, random_flips, sample_noise
from .feature_statistics import fit_statistics, image_batches, read_statistics
from .image_feed import image_feed
from .job import Adversary, Job
from .launch import TrainResult, fit, prepare_worker
from .loop import run_job
from .tracking import resolve_uri

MAX_VALIDATION_IMAGES = 512
FIGURE_ROWS = 6


def train_pixel_decoder(recipe: Recipe, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Train, resume or, where the run is finished, return at once; `callbacks` are Ray Train's.

    Raises RecipeError, SourceError, CheckpointError for parts that do not belong together, NonFiniteError.
    """
    run_uri = run_folder.run_folder(recipe)
    section = recipe.pixel_decoder
    if section.stage == "finetune" and not (section.start_from and recipe.autoencoder.checkpoint):
        raise RecipeError(
            "pixel_decoder.stage=finetune needs pixel_decoder.start_from=FIRST_STAGE and "
            "autoencoder.checkpoint=AUTOENCODER (both .safetensors)."
        )
    run_folder.claim_run(recipe, run_uri, ("data", "backbone", "pixel_decoder"))
    if run_folder.result(run_uri) is None:
        run_folder.plan(recipe, run_uri)
        start_ray()
        values = with_absolute_paths(recipe).model_dump(mode="json")
        config = {"recipe": values, "tracking_uri": resolve_uri(recipe.tracking)}
        fit(_worker, config, recipe, section.training, callbacks)
    return TrainResult(
        paths.join(run_uri, "pixel_decoder.safetensors"), run_folder.result(run_uri) or {}
    )


def make_adversary(recipe: Recipe, backbone: Backbone) -> Discriminator | None:
    """The recipe's discriminator, untrained; None where its weight is 0."""
    losses = recipe.pixel_decoder.losses
    if not losses.adversarial_weight:
        return None
    depth = len(backbone.model.blocks)
    taps = [depth * (i + 1) // 4 - 1 for i in range(4)]
    return Discriminator(losses.discriminator, backbone.dim, backbone.grid, taps)


class Objective:
    """The losses of one worker: what the model hears, then what the adversary hears about the same images."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        autoencoder: Any,
        adversary: Discriminator | None,
        noise_std: float,
    ) -> None:
        self.recipe = recipe
        self.section = recipe.pixel_decoder
        self.losses = self.section.losses
        self.backbone = backbone
        self.autoencoder = autoencoder
        self.adversary = adversary
        self.noise_std = noise_std
        device = backbone.mean.device
        kinds = self.losses.perceptual
        self.lpips = lpips_distance().to(device) if kinds in ("lpips", "both") else None
        self.by_backbone = BackboneDistance(backbone) if kinds in ("backbone", "both") else None
        self.pair: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def inputs(self, features: Tensor, batch: Batch) -> Tensor:
        """What the decoder is to decode, [B, N, D]: features with noise, or rebuilt from (noised) latents."""
        if self.autoencoder is None:
            noise = sample_noise(self.recipe.seed, "features", batch, tuple(features.shape[1:]))
            return features + self.noise_std * noise
        latents = self.autoencoder.encode(features).mode()
        if self.section.latent_noise:
            noise = sample_noise(self.recipe.seed, "latents", batch, tuple(latents.shape[1:]))
            std = latents.float().std(dim=(0, 1), keepdim=True)
            latents = latents + self.section.latent_noise * std * noise
        return self.autoencoder.decode(latents)

    def model_loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted pixel, perceptual and, once it has started, adversarial terms."""
        weights, step = self.losses, batch.step
        images = random_flips(self.recipe.seed, batch) if self.section.flip else batch["images"]
        with torch.no_grad():
            features = self.backbone(images).float()
        target = from_uint8(images)
        output = model(self.inputs(features, batch))
        self.pair = (target, output.detach())
        terms = {"pixel": pixel_error(output, target, weights.pixel)}
        loss = weights.pixel_weight * terms["pixel"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips(output * 2 - 1, target * 2 - 1).float().mean()
            loss = loss + weights.lpips_weight * terms["lpips"]
        if self.by_backbone is not None:
            terms["backbone_distance"] = self.by_backbone(output, target).mean()
            loss = loss + weights.backbone_weight * terms["backbone_distance"]
        if self.adversary is not None and step >= weights.adversarial_start:
            terms["adversarial"] = -self._judge_frozen(
                self._augmented(output, batch, "heard")
            ).mean()
            adversarial = weights.adversarial_weight * terms["adversarial"]
            if weights.adaptive:
                inner: Any = getattr(model, "module", model)
                factor = adaptive_weight(loss, terms["adversarial"], inner.output.weight)
                terms["adaptive_weight"] = weights.adversarial_weight * factor
                adversarial = factor * adversarial
            loss = loss + adversarial
        return {"loss": loss, **terms}

    def adversary_loss(self, adversary: nn.Module, batch: Batch) -> dict[str, Tensor] | None:
        """Hinge and LeCam terms on the images that `model_loss` has just seen; None before the adversary's start."""
        assert self.adversary is not None and self.pair is not None
        if batch.step < self.losses.discriminator_start:
            return None
        target, output = self.pair
        both = torch.cat(
            [self._augmented(target, batch, "real"), self._augmented(output, batch, "fake")]
        )
        real, fake = adversary(both, self.backbone).float().chunk(2)
        penalty = self.adversary.lecam(real, fake)
        hinge = discriminator_loss(real, fake)
        return {
            "adversary_loss": hinge + self.losses.lecam_weight * penalty,
            "real_logit": real.mean().detach(),
            "fake_logit": fake.mean().detach(),
        }

    def _augmented(self, images: Tensor, batch: Batch, stream: str) -> Tensor:
        if not self.losses.augment:
            return images
        draws = uniform_draws(
            self.recipe.seed, f"augment {stream}", batch.step, batch.samples, (5,), images.device
        )
        return augment(images, draws)

    def _judge_frozen(self, images: Tensor) -> Tensor:
        """Logits whose gradient reaches the images and stops at the adversary's weights."""
        assert self.adversary is not None
        frozen = {name: p.detach() for name, p in self.adversary.named_parameters()}
        return functional_call(self.adversary, frozen, (images, self.backbone)).float()


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    from ray.train.collective import barrier

    recipe = Recipe.model_validate(config["recipe"])
    section = recipe.pixel_decoder
    run_uri = run_folder.run_folder(recipe)
    device = ray.train.torch.get_device()
    prepare_worker(device, recipe.pixel_decoder.training)
    is_first = ray.train.get_context().get_world_rank() == 0
    training, validation = split_records(
        run_folder.read_plan(run_uri), recipe.data.validation_fraction
    )
    backbone = backbone_of(recipe).to(device)
    if is_first:
        chosen = training[: section.statistics_images]
        fit_statistics(chosen, recipe, run_uri, backbone, section.training.precision)
    barrier()
    mean, std = read_statistics(run_uri)
    autoencoder: Any = None
    if recipe.autoencoder.checkpoint:
        autoencoder = autoencoder_of(recipe, backbone).module.to(device).requires_grad_(False)

    torch.manual_seed(recipe.seed)
    model = _starting_model(recipe, backbone, mean, std)
    adversary = make_adversary(recipe, backbone)
    # Statistics per channel give the features' root mean square without looking at them again.
    rms = float((mean.square() + std.square()).mean().sqrt())
    noise_std = noise_scale(section.noise_sigma, rms, section.noise_reference_rms)
    objective = Objective(
        recipe,
        backbone,
        autoencoder if section.stage == "finetune" else None,
        adversary,
        noise_std,
    )
    feed = image_feed(training, recipe.data, recipe.image_size, recipe.seed, section.training)
    judged = None
    if adversary is not None:
        rate = section.losses.discriminator_learning_rate
        judged = Adversary(adversary, objective.adversary_loss, rate)
    held_out = None
    if validation and is_first:
        held_out = _HeldOut(validation, objective, autoencoder)
    frozen = {"backbone": backbone, "autoencoder": autoencoder, "lpips": objective.lpips}
    beside = {name: module for name, module in frozen.items() if module is not None}
    job = Job(model, feed, objective.model_loss, held_out, judged, beside)
    trained, metrics = run_job(job, section.training, recipe, run_uri, config["tracking_uri"])
    if is_first:
        fingerprints = backbone_fingerprints(recipe, backbone)
        run_folder.finish(run_uri, "pixel_decoder", trained, fingerprints, metrics)


def _starting_model(recipe: Recipe, backbone: Backbone, mean: Tensor, std: Tensor) -> PixelDecoder:
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


class _HeldOut:
    """PSNR, SSIM and perceptual distance on held-out images: from true features, and from rebuilt ones."""

    def __init__(
        self, records: Sequence[ImageRecord], objective: Objective, autoencoder: Any
    ) -> None:
        self.records = records[:MAX_VALIDATION_IMAGES]
        self.objective = objective
        self.autoencoder = autoencoder
        self.images: list[np.ndarray] | None = None

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        recipe, backbone = self.objective.recipe, self.objective.backbone
        device, precision = backbone.mean.device, self.objective.section.training.precision
        if self.images is None:
            made = decoded(image_batches(self.records), recipe.data, recipe.image_size)
            self.images = [np.array(images) for images, kept, _ in made if kept]
        sums: dict[str, float] = {}
        count = 0
        figure: bytes | None = None
        for array in self.images:
            images = torch.from_numpy(array).to(device)
            features = features_of(backbone, images, precision)
            target = from_uint8(images)
            sources = {"": features}
            if self.autoencoder is not None:
                sources["rebuilt_"] = self.autoencoder.decode(
                    self.autoencoder.encode(features).mode()
                )
            shown: list[np.ndarray] = [array]
            for prefix, source in sources.items():
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    output = model(source).clamp(0.0, 1.0)
                for name, value in self._scores(output, target).items():
                    sums[prefix + name] = sums.get(prefix + name, 0.0) + value
                shown.append(to_uint8(output).cpu().numpy())
            count += len(array)
            if figure is None:
                rows = [
                    [column[i] for column in shown] for i in range(min(FIGURE_ROWS, len(array)))
                ]
                titles = ("original", "from features", "from rebuilt features")
                figure = picture_grid(rows, titles[: len(shown)])
        metrics = {name: value / count for name, value in sums.items()}
        return metrics | {"num_images": float(count)}, figure

    def _scores(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """Sums over the batch."""
        scores = {
            "psnr": float(psnr(output, target).sum()),
            "ssim": float(ssim(output, target).sum()),
        }
        if self.objective.by_backbone is not None:
            scores["backbone_distance"] = float(self.objective.by_backbone(output, target).sum())
        if self.objective.lpips is not None:
            scores["lpips"] = float(self.objective.lpips(output * 2 - 1, target * 2 - 1).sum())
        return scores
