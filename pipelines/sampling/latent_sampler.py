"""Noise to latents on one device: the generator and the recipe's sampler.

Image i of a seed has its own noise, whatever else is drawn with it, on any machine. `fae sample`
runs this in actors, `fae train generator` for its previews.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fae_core.draws import normal_draws
from fae_core.generators.dit import DiT
from fae_core.generators.starflow import StarFlow
from fae_core.precision import autocast
from fae_core.samplers import PAPER_GUIDANCE, GuidanceInterval, sample_ode, sample_sde

from ..config.sections import SampleSection


def image_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [n, *shape] float32; each image's depends on (seed, index) alone."""
    return normal_draws(seed, "image", 0, list(indices), tuple(shape))


def intervals(sample: SampleSection) -> tuple[GuidanceInterval, ...]:
    """The guidance schedule that the recipe asks for."""
    if sample.guidance == "none":
        return ()
    if sample.guidance == "paper":
        return PAPER_GUIDANCE
    return tuple(GuidanceInterval(g.start, g.end, g.scale) for g in sample.guidance)


class LatentSampler:
    """Raw latents [n, C, H, W] of noise, labels and image indices, by the recipe's sampler."""

    def __init__(
        self, model: DiT | StarFlow, sample: SampleSection, seed: int, device: torch.device
    ) -> None:
        self.model = model
        self.sample = sample
        self.seed = seed
        self.device = device

    def __call__(self, noise: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        sample, model = self.sample, self.model
        noise, labels = (t.to(self.device, non_blocking=True) for t in (noise, labels))
        if isinstance(model, StarFlow):
            x = model.sample(noise, labels, sample.flow_guidance)
            if sample.denoise:
                with torch.inference_mode(False):  # its score is a gradient
                    x = model.denoise(x.clone(), labels.clone())
            return model.denormalize(x)
        guidance, null = intervals(sample), model.null_class
        with autocast(sample.precision, self.device):
            if sample.sampler == "ode":
                x = sample_ode(model, noise, labels, sample.num_steps, sample.shift, guidance, null)
            else:
                shape = tuple(noise.shape[1:])

                def step_noise(step: int) -> Tensor:
                    return normal_draws(self.seed, "sde", step, list(indices), shape)

                x = sample_sde(
                    model, noise, labels, step_noise, sample.num_steps, sample.shift, guidance, null
                )
        return model.denormalize(x)
