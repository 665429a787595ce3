"""The networks that a recipe describes, with their initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fae_core.autoencoder import AutoencoderConfig
from fae_core.backbone import Backbone, BackboneSpec
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.pixel_decoder import PixelDecoderConfig

from ..config import Recipe, RecipeError
from ..config.sections import GeneratorSection


def autoencoder_config(recipe: Recipe, backbone: Backbone | BackboneSpec) -> AutoencoderConfig:
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


def pixel_decoder_config(recipe: Recipe, backbone: Backbone | BackboneSpec) -> PixelDecoderConfig:
    """The recipe's pixel decoder for this backbone's features."""
    section = recipe.pixel_decoder
    preset = PixelDecoderConfig.preset(section.size, backbone.dim, backbone.grid, recipe.image_size)
    return replace(
        preset,
        width=section.width or preset.width,
        depth=section.depth or preset.depth,
        num_heads=section.num_heads or preset.num_heads,
    )


def build_generator(
    section: GeneratorSection, latent_shape: Sequence[int], device: str = "cpu"
) -> DiT | StarFlow:
    """The recipe's network for latents [C, H, W], untrained.

    Raises RecipeError for a size that there is not.
    """
    channels, *grid = latent_shape
    shape = (channels, (grid[0], grid[1]))
    common: dict[str, Any] = {
        "num_classes": section.num_classes,
        "label_dropout": section.label_dropout,
        "checkpoint_activations": section.checkpoint_activations,
    }
    if section.width is not None:
        common["width"] = section.width
    try:
        with torch.device(device):
            if section.kind == "starflow":
                if section.layers is not None:
                    common["layers"] = tuple(section.layers)
                flow = StarFlowConfig.preset(
                    section.size, *shape, noise_std=section.noise_std, **common
                )
                return StarFlow(flow)
            for name in ("depth", "num_heads"):
                if getattr(section, name) is not None:
                    common[name] = getattr(section, name)
            dit = DiTConfig.preset(
                section.size,
                *shape,
                patch_size=section.patch_size,
                mlp=section.mlp,
                norm=section.norm,
                rope=section.rope,
                qk_norm=section.qk_norm,
                **common,
            )
            return DiT(dit)
    except ValueError as error:
        raise RecipeError(f"generator: {error}") from None
