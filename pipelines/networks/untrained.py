"""The networks that a recipe describes, with their initial weights or with shapes alone.

Trainers start from them; the chain counts their parameters, and the estimates of memory run them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.backbone import Backbone, untrained_backbone
from fae_core.backbone_presets import BackboneSpec, resolve_spec
from fae_core.errors import UserError
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.mmdit import MMDiT, MMDiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from fae_core.text import text_width

from ..config import Recipe, RecipeError
from ..config.sections import (
    AutoencoderSection,
    BackboneSection,
    GeneratorSection,
    PixelDecoderSection,
    TextSection,
)
from .text_encoder import text_spec


@contextlib.contextmanager
def _named(section: str) -> Iterator[None]:
    """A shape that a network cannot have is a mistake in the recipe's `section`: RecipeError."""
    try:
        yield
    except UserError:  # of a text encoder
        raise
    except ValueError as error:
        raise RecipeError(f"{section}: {error}") from None


def build_backbone(section: BackboneSection) -> Backbone:
    """The section's backbone with random weights: nothing is downloaded or hashed.

    Raises WeightsError for a name or an image size that there is not.
    """
    return untrained_backbone(resolve_spec(section.name, section.image_size, section.layers))


def backbone_spec(recipe: Recipe) -> BackboneSpec:
    """Width and grid of the recipe's backbone, built without its weights. Raises WeightsError."""
    with torch.device("meta"):
        return build_backbone(recipe.backbone).spec


def build_autoencoder(section: AutoencoderSection, backbone: BackboneSpec) -> FeatureAutoencoder:
    """The section's autoencoder for this backbone's features.

    Raises RecipeError for a shape that there cannot be, such as heads that do not divide a width.
    """
    config = AutoencoderConfig(
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
    with _named("autoencoder"):
        return FeatureAutoencoder(config)


def build_pixel_decoder(
    section: PixelDecoderSection, backbone: BackboneSpec, image_size: int
) -> PixelDecoder:
    """The section's decoder of this backbone's features to images of side `image_size` [px].

    Raises RecipeError for a shape that there cannot be, such as a grid that does not divide it.
    """
    with _named("pixel_decoder"):
        return PixelDecoder(pixel_decoder_config(section, backbone, image_size))


def pixel_decoder_config(
    section: PixelDecoderSection, backbone: BackboneSpec, image_size: int
) -> PixelDecoderConfig:
    """What `build_pixel_decoder` builds, and what a checkpoint that it starts from must be."""
    preset = PixelDecoderConfig.preset(section.size, backbone.dim, backbone.grid, image_size)
    return replace(
        preset,
        width=section.width or preset.width,
        depth=section.depth or preset.depth,
        num_heads=section.num_heads or preset.num_heads,
        head=section.head,
        mlp_width=section.mlp_width or preset.mlp_width,
    )


def build_generator(
    section: GeneratorSection, latent_shape: Sequence[int], text: TextSection | None = None
) -> DiT | MMDiT | StarFlow:
    """The section's network for latents [C, H, W], untrained.

    An mmdit is one for the token states of the encoder that `text` describes. Raises RecipeError
    for a size that there is not, or a shape that there cannot be, WeightsError where the encoder's
    configuration is not to be had.
    """
    channels, *grid = latent_shape
    shape = (channels, (grid[0], grid[1]))
    common: dict[str, Any] = {"checkpoint_activations": section.checkpoint_activations}
    if section.width is not None:
        common["width"] = section.width
    if section.kind != "mmdit":
        common["num_classes"] = section.num_classes
        common["label_dropout"] = section.label_dropout
    with _named("generator"):
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
        for name in ("patch_size", "rope", "qk_norm"):
            common[name] = getattr(section, name)
        if section.kind == "mmdit":
            text_dim = text_width(text_spec(text or TextSection()))
            return MMDiT(MMDiTConfig.preset(section.size, *shape, text_dim, **common))
        dit = DiTConfig.preset(section.size, *shape, mlp=section.mlp, norm=section.norm, **common)
        return DiT(dit)


def network_bytes(*networks: nn.Module) -> int:
    """Bytes of the networks' parameters and buffers."""
    return sum(t.nbytes for network in networks for t in tensors_of(network))


def tensors_of(network: nn.Module) -> list[Tensor]:
    """The network's parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def fake_networks(*networks: nn.Module) -> FakeTensorMode:
    """Put fake tensors of the CPU in the place of the networks' parameters and buffers.

    Inside the mode that is returned the networks run on tensors made there. Fake tensors have the
    shape, dtype and device of real ones, so the CPU's kernels are chosen as always, and no memory.
    Networks that were built on torch's meta device never had any.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for network in networks:
        network.to("meta")
        with mode:
            network.to_empty(device="cpu")
    return mode
