"""What the pixel decoder is trained on: reconstruction, perceptual and adversarial losses.

The kinds of losses are those of arXiv 2512.07829, eq. 4.2; fae_core/losses.py and discriminator.py
say where their terms and constants come from. The trainer is pixel_decoder.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fae_core.autoencoder import FeatureAutoencoder
from fae_core.backbone import Backbone
from fae_core.discriminator import Discriminator, augment, discriminator_loss
from fae_core.draws import uniform_draws
from fae_core.losses import (
    BackboneDistance,
    adaptive_weight,
    edge_error,
    lpips_distance,
    pixel_error,
)
from fae_core.pixel_decoder import PixelDecoder, from_uint8

from ..config import Recipe
from ..config.sections import LossesSection, PixelDecoderSection
from ..networks.untrained import build_autoencoder, build_backbone, build_pixel_decoder
from .batches import Batch, images_and_features, sample_noise
from .image_feed import blank_images
from .job import Adversary, Job, UntrainedJob


class Objective:
    """The losses of one worker: the model's, then the adversary's on the same images.

    `autoencoder` rebuilds the features of stage `finetune`; `noise_std` is that of stage `noisy`,
    on raw features, or that of stage `finetune`, on latents, of each channel [C].
    """

    def __init__(
        self,
        section: PixelDecoderSection,
        seed: int,
        backbone: Backbone,
        autoencoder: FeatureAutoencoder | None,
        adversary: Discriminator | None,
        noise_std: float | Tensor,
    ) -> None:
        self.section = section
        self.losses = section.losses
        self.seed = seed
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
        """What the decoder decodes, [B, N, D], of features [B, N, D].

        Stage `noisy` adds noise to them, `finetune` rebuilds them from latents with or without it.
        """
        if self.section.stage == "noisy":
            noise = sample_noise(self.seed, "features", batch, tuple(features.shape[1:]))
            return features + self.noise_std * noise
        assert self.autoencoder is not None
        latents = self.autoencoder.encode(features).mode()
        if self.section.latent_noise:
            noise = sample_noise(self.seed, "latents", batch, tuple(latents.shape[1:]))
            latents = latents + self.noise_std * noise
        return self.autoencoder.decode(latents)

    def model_loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted pixel, perceptual and, once it has started, adversarial terms."""
        weights, step = self.losses, batch.step
        images, features = images_and_features(self.seed, batch, self.section.flip, self.backbone)
        target = from_uint8(images)
        output = model(self.inputs(features.float(), batch))
        self.pair = (target, output.detach())
        terms = {"pixel": pixel_error(output, target, weights.pixel, weights.scales)}
        loss = weights.pixel_weight * terms["pixel"]
        if weights.edge_weight:
            terms["edge"] = edge_error(output, target, weights.scales)
            loss = loss + weights.edge_weight * terms["edge"]
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
        """Hinge and LeCam terms on the images that `model_loss` has just seen.

        None before the adversary's start.
        """
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

    def after_step(self, terms: Mapping[str, Tensor], share: float) -> None:
        """Move LeCam's running means by the logits of all workers' images."""
        assert self.adversary is not None
        real, fake = terms["real_logit"], terms["fake_logit"]
        sums = torch.stack([real, fake, real.new_full((), share)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            sums /= torch.distributed.get_world_size()
        self.adversary.lecam.update(*sums)

    def _augmented(self, images: Tensor, batch: Batch, stream: str) -> Tensor:
        if not self.losses.augment:
            return images
        draws = uniform_draws(
            self.seed, f"augment {stream}", batch.step, batch.samples, (5,), images.device
        )
        return augment(images, draws)

    def _judge_frozen(self, images: Tensor) -> Tensor:
        """Logits whose gradient reaches the images and stops at the adversary's weights."""
        assert self.adversary is not None
        frozen = {name: p.detach() for name, p in self.adversary.named_parameters()}
        return functional_call(self.adversary, frozen, (images, self.backbone)).float()


def make_adversary(losses: LossesSection, backbone: Backbone) -> Discriminator | None:
    """The section's discriminator, untrained; None where its weight is 0."""
    if not losses.adversarial_weight:
        return None
    depth = len(backbone.model.blocks)
    taps = [depth * (i + 1) // 4 - 1 for i in range(4)]
    return Discriminator(losses.discriminator, backbone.dim, backbone.grid, taps)


def pixel_decoder_job(model: PixelDecoder, objective: Objective) -> Job:
    """The job that trains `model` and the adversary on `objective`."""
    adversary = None
    if objective.adversary is not None:
        rate = objective.losses.discriminator_learning_rate
        adversary = Adversary(
            objective.adversary, objective.adversary_loss, rate, objective.after_step
        )
    frozen: dict[str, nn.Module | None] = {
        "backbone": objective.backbone,
        "autoencoder": objective.autoencoder,
        "lpips": objective.lpips,
    }
    beside = {name: module for name, module in frozen.items() if module is not None}
    retains_graph = adversary is not None and objective.losses.adaptive
    return Job(model, objective.model_loss, adversary, beside, retains_graph)


def untrained_job(recipe: Recipe) -> UntrainedJob:
    """The recipe's job with initial weights, and its blank batches of any number of images.

    requirements.py measures them by their shapes.
    """
    section, backbone = recipe.pixel_decoder, build_backbone(recipe.backbone)
    autoencoder = None
    if section.stage == "finetune":
        autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec).requires_grad_(False)
    adversary = make_adversary(section.losses, backbone)
    objective = Objective(section, recipe.seed, backbone, autoencoder, adversary, noise_std=1.0)
    model = build_pixel_decoder(section, backbone.spec, recipe.image_size)
    blank = functools.partial(blank_images, size=recipe.image_size)
    return pixel_decoder_job(model, objective), blank
