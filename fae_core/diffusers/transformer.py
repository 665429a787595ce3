"""FAETransformer2DModel: FAE's diffusion transformer as a model of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from fae_core.checkpoint import build
from fae_core.precision import autocast_to

NUM_TIMESTEPS = 1000.0
"""diffusers' timestep of pure noise; FAE's time t of it is 1."""


class FAETransformer2DModel(ModelMixin, ConfigMixin):
    """Velocities of normalized latents, in the convention of diffusers' flow matching schedulers.

    Times are in [0, 1000], 1000 is noise, and the velocity is noise - data.
    """

    @register_to_config
    def __init__(self, dit_config: dict[str, Any], class_names: Sequence[str] = ()) -> None:
        """`dit_config` has the fields of DiTConfig; `class_names` are the classes' by number."""
        super().__init__()
        self.dit = build("dit", dit_config)
        self.to(torch.get_default_dtype())  # diffusers sets it; tables of positions ignore it

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity [B, C, H, W] float32 of latents [B, C, H, W] at timesteps [B] or of no axis.

        `class_labels` int64 [B]; the class `dit.null_class` is for guidance.
        """
        t = (timestep.float() / NUM_TIMESTEPS).expand(len(hidden_states))
        with autocast_to(self.dtype, hidden_states.device):
            velocity = self.dit(hidden_states, t, class_labels).float()
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
