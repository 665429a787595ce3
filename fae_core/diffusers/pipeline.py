"""FAEPipeline: class labels to images by diffusers' FlowMatchEulerDiscreteScheduler.

From the same noise it draws the images of `fae sample` with `sampler=ode`: the scheduler's steps
are those of `fae_core.samplers.sample_ode`, shifted by the scheduler's own `shift`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fae_core.diffusers.autoencoder import AutoencoderFAE
from fae_core.diffusers.transformer import NUM_TIMESTEPS, FAETransformer2DModel
from fae_core.samplers import (
    PAPER_GUIDANCE,
    GuidanceInterval,
    guided_velocity,
)
from fae_core.samplers import guidance_scale as scale_at

COMPONENTS: dict[str, Any] = {
    "vae": AutoencoderFAE,
    "transformer": FAETransformer2DModel,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
Guidance = float | Literal["paper"] | Sequence[GuidanceInterval]


class FAEPipeline(DiffusionPipeline):
    """`pipeline(class_labels=[…]).images`, drawn by generator, scheduler and AutoencoderFAE."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: AutoencoderFAE,
        transformer: FAETransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> FAEPipeline:
        """The pipeline of a folder or of OWNER/NAME on the Hub; no code of the folder runs.

        `kwargs` go to both models; a component among them (`vae=…`) replaces the folder's.
        """
        place, given = str(pretrained_model_name_or_path), {}
        for name, kind in COMPONENTS.items():
            if (component := kwargs.pop(name, None)) is None:
                options = {
                    k: v for k, v in kwargs.items() if name != "scheduler" or k in HUB_OPTIONS
                }
                component = kind.from_pretrained(place, subfolder=name, **options)
            given[name] = component
        return cls(**given)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        num_inference_steps: int = 250,
        guidance_scale: Guidance = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each of `class_labels`, which are numbers or the generator's class names.

        `guidance_scale` is one scale for all times (1 is none), `paper`, or intervals. `latents`
        [n, C, H, W] are the noise to start from, drawn by `generator` if they are not given.
        `output_type` is pil, np, pt, or latent for raw latents. Raises ValueError for a label that
        is none of the generator's classes, and for guidance of a generator without a null class.
        """
        device, dit = self._execution_device, self.transformer.dit
        labels = torch.tensor([self._class(label) for label in class_labels], device=device)
        shape = (len(labels), dit.config.latent_dim, *dit.config.grid)
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"Expected latents {list(shape)}, not {list(latents.shape)}.")
        x = latents.to(device, torch.float32)
        intervals = _intervals(guidance_scale)
        if dit.config.label_dropout == 0.0 and any(some.scale != 1.0 for some in intervals):
            raise ValueError(
                "guidance_scale: this generator was trained without dropped labels "
                "(label_dropout=0), so no class stands for none. Leave guidance_scale at 1."
            )
        # The scheduler appends 0 and shifts; its own default ends at 1/1000 before the shift.
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        # On the CPU: reading a time from a GPU would wait for all steps before.
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device="cpu")
        for timestep in self.progress_bar(self.scheduler.timesteps):
            t = float(timestep) / NUM_TIMESTEPS
            scale = scale_at(round(t, 6), intervals)  # float32 rounds an interval's end
            v = guided_velocity(self._velocity, x, t, labels, dit.null_class, scale)
            x = self.scheduler.step(v, timestep, x, return_dict=False)[0]
        raw = x * self._statistic("latents_std", x) + self._statistic("latents_mean", x)
        images = raw
        if output_type != "latent":
            decoded = self.vae.decode(raw, return_dict=False)[0]
            images = self.image_processor.postprocess(decoded, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.transformer(x, t * NUM_TIMESTEPS, labels, return_dict=False)[0]

    def _statistic(self, name: str, like: Tensor) -> Tensor:
        """A statistic of the autoencoder's configuration, [1, C, 1, 1]."""
        return torch.tensor(self.vae.config[name], device=like.device).view(1, -1, 1, 1)

    def _class(self, label: int | str) -> int:
        names = list(self.transformer.config.class_names)
        number = names.index(label) if label in names else label
        count = self.transformer.dit.config.num_classes
        if not isinstance(number, int) or not 0 <= number < max(count, 1):
            raise ValueError(f"{label!r} is none of the generator's {count} classes.")
        return number


def _intervals(guidance: Guidance) -> Sequence[GuidanceInterval]:
    if guidance == "paper":
        return PAPER_GUIDANCE
    if isinstance(guidance, int | float):
        return (GuidanceInterval(1.0, 0.0, float(guidance)),)
    return [GuidanceInterval(*interval) for interval in guidance]  # type: ignore[misc]
