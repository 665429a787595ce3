"""AutoencoderFAE: backbone, autoencoder and pixel decoder as one autoencoder of diffusers.

Images go in and come out in [-1, 1], as with diffusers' other variational autoencoders. Latents are
raw; `config.latents_mean` and `config.latents_std` are those that a generator normalizes with.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from fae_core.backbone import Backbone, load_backbone
from fae_core.backbone_presets import parse_backbone_label
from fae_core.checkpoint import CheckpointError, build
from fae_core.precision import autocast_to


class AutoencoderFAE(ModelMixin, ConfigMixin):
    """`encode(x).latent_dist` and `decode(z).sample` of a trained FAE with its pixel decoder.

    The frozen backbone is not among the weights. `encode` loads it when it is first called, from
    `backbone_weights` (see `fae_core.weights`); whoever only decodes needs none.
    """

    @register_to_config
    def __init__(
        self,
        autoencoder_config: dict[str, Any],
        pixel_decoder_config: dict[str, Any],
        backbone: str,
        backbone_sha256: str,
        image_size: int,
        backbone_weights: str = "hub",
        pixel_decoder_kind: str = "pixel_decoder",
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        """`autoencoder_config` and `pixel_decoder_config` have the fields of the networks' own
        configurations, `backbone` is the label of the frozen encoder, `image_size` [px] the side of
        the crops. diffusers needs names here that are none of the modules'.
        """
        super().__init__()
        self.autoencoder = build("autoencoder", autoencoder_config)
        self.pixel_decoder = build(pixel_decoder_kind, pixel_decoder_config)
        self.to(torch.get_default_dtype())  # diffusers sets it; tables of positions ignore it
        self._backbone: list[Backbone] = []  # a list: its weights are no part of the state

    @apply_forward_hook  # offloading moves a module before `forward` alone
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Posterior over raw latents [B, C, H, W], float32, of images [B, 3, S, S] in [-1, 1].

        `fae precompute` crops images to S = `config.image_size`. Raises WeightsError if the
        backbone cannot be loaded, and CheckpointError if its weights are others than those that the
        autoencoder was trained on.
        """
        backbone = self._frozen_backbone().to(x.device)
        pixels = ((x.float() + 1.0) / 2.0).clamp(0.0, 1.0)
        features = backbone.input_tokens(backbone.normalize(pixels))[0]
        with autocast_to(self.dtype, x.device):
            posterior = self.autoencoder.encode(features)
        tokens = torch.cat([posterior.mean, posterior.logvar], dim=-1)
        grid = self.autoencoder.config.grid
        latent_dist = DiagonalGaussianDistribution(tokens.transpose(1, 2).unflatten(2, grid))
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, **_: Any
    ) -> DecoderOutput | tuple[Tensor]:
        """Images [B, 3, S, S], float32 and near [-1, 1], of raw latents [B, C, H, W]."""
        with autocast_to(self.dtype, z.device):
            features = self.autoencoder.decode(z.flatten(2).transpose(1, 2))
            images = self.pixel_decoder(features).float() * 2.0 - 1.0
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:  # fmt: skip
        """The reconstruction [B, 3, S, S] of images [B, 3, S, S], both in [-1, 1]."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict)

    def _frozen_backbone(self) -> Backbone:
        if not self._backbone:
            config = self.config
            name, input_size, layers = parse_backbone_label(config.backbone)
            backbone = load_backbone(name, config.backbone_weights, input_size, layers)
            if backbone.weights_sha256 != config.backbone_sha256:
                raise CheckpointError(
                    f"This autoencoder was trained on {config.backbone} with weights of the "
                    f"SHA-256 {config.backbone_sha256}; those of "
                    f"backbone_weights={config.backbone_weights!r} have "
                    f"{backbone.weights_sha256}. Give from_pretrained another backbone_weights."
                )
            self._backbone.append(backbone)
        return self._backbone[0]
