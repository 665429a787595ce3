"""Noise to latents on one device: the generator and the recipe's sampler.

Image i of a seed has its own noise, whatever else is drawn with it, on any machine. `fae sample`
runs this in actors, `fae train generator` for its previews.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fae_core.draws import normal_draws
from fae_core.flow_matching import Velocity
from fae_core.generators.dit import DiT
from fae_core.generators.mmdit import MMDiT
from fae_core.generators.starflow import StarFlow
from fae_core.precision import autocast
from fae_core.samplers import (
    PAPER_GUIDANCE,
    PAPER_TEXT_GUIDANCE,
    GuidanceInterval,
    sample_ode,
    sample_sde,
)

from ..config import RecipeError
from ..config.sections import SampleSection
from .prompts import Prompts

RAE_BASE_DIMENSION = 4096
"""Values of a latent for which RAE's shift is 1 (arXiv 2510.11690)."""


def image_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [n, *shape] float32; each image's depends on (seed, index) alone."""
    return normal_draws(seed, "image", 0, list(indices), tuple(shape))


def intervals(sample: SampleSection) -> tuple[GuidanceInterval, ...]:
    """The guidance schedule that the recipe asks for."""
    if sample.guidance == "none":
        return ()
    if sample.guidance == "paper":
        return PAPER_GUIDANCE
    if sample.guidance == "paper-text":
        return PAPER_TEXT_GUIDANCE
    return tuple(GuidanceInterval(g.start, g.end, g.scale) for g in sample.guidance)


def sampling_shift(sample: SampleSection, latent_shape: Sequence[int]) -> float:
    """The timestep shift for latents [C, H, W] that the recipe asks for."""
    if sample.shift == "dimension":
        return math.sqrt(math.prod(latent_shape) / RAE_BASE_DIMENSION)
    return sample.shift


class LatentSampler:
    """Raw latents [n, C, H, W] of noise, labels and image indices, by the recipe's sampler.

    The labels of an MMDiT are numbers of its `prompts`. They come from the CPU. `guide` is the
    weaker network that guidance leads away from, of the model's kind and for the same latents.
    """

    def __init__(
        self,
        model: DiT | MMDiT | StarFlow,
        sample: SampleSection,
        seed: int,
        device: torch.device,
        prompts: Prompts | None = None,
        guide: DiT | MMDiT | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.sample = sample
        self.seed = seed
        self.device = device
        self.prompts = prompts

    def check(self) -> None:
        """Raises RecipeError where guidance is asked of a generator that has no null class, or a
        guide has nothing to do."""
        key, none = "guidance", "none"
        guided = any(interval.scale != 1.0 for interval in intervals(self.sample))
        if isinstance(self.model, StarFlow):
            key, none, guided = "flow_guidance", "0", self.sample.flow_guidance > 0.0
        if self.guide:
            if not guided:
                raise RecipeError(
                    "sample.guide does nothing without a scale: set sample.guidance too, such as "
                    "[{start: 1.0, end: 0.0, scale: 1.5}]."
                )
            return
        if isinstance(self.model, MMDiT):
            return
        if guided and self.model.config.label_dropout == 0.0:
            raise RecipeError(
                f"sample.{key}: this generator was trained without dropped labels "
                f"(label_dropout=0), so no class stands for none. Set sample.{key}={none}."
            )

    def __call__(self, noise: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        sample, model = self.sample, self.model
        velocity: Velocity
        guide: Velocity | None
        if isinstance(model, MMDiT):
            assert self.prompts is not None and not isinstance(self.guide, DiT)
            velocity_of, labels, null = self.prompts.condition(labels)
            velocity = velocity_of(model)
            guide = velocity_of(self.guide) if self.guide else None
        elif isinstance(model, DiT):
            velocity, guide, null = model, self.guide, model.null_class
        noise, labels = (t.to(self.device, non_blocking=True) for t in (noise, labels))
        if isinstance(model, StarFlow):
            x = model.sample(noise, labels, sample.flow_guidance)
            if sample.denoise:
                with torch.inference_mode(False):  # its score is a gradient
                    x = model.denoise(x.clone(), labels.clone())
            return model.denormalize(x)
        shape = tuple(noise.shape[1:])
        settings: dict[str, Any] = {
            "num_steps": sample.num_steps,
            "shift": sampling_shift(sample, shape),
            "guidance": intervals(sample),
            "null_class": null,
            "guidance_channels": sample.guidance_channels,
            "guide": guide,
        }
        with autocast(sample.precision, self.device):
            if sample.sampler != "sde":
                second_order = sample.sampler == "heun"
                x = sample_ode(velocity, noise, labels, second_order=second_order, **settings)
            else:

                def step_noise(step: int) -> Tensor:
                    return normal_draws(self.seed, "sde", step, list(indices), shape)

                settings |= {
                    "diffusion_scale": sample.diffusion_scale,
                    "last_step": sample.last_step,
                }
                x = sample_sde(velocity, noise, labels, step_noise, **settings)
        return model.denormalize(x)
