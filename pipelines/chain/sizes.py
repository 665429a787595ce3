"""How much a stage of the chain writes, estimated before it runs (`fae run --dry-run`)."""

from __future__ import annotations

import torch
from torch import nn

from fae_core.text import text_width

from ..config import Recipe
from ..networks.text_encoder import text_spec
from ..networks.untrained import (
    backbone_spec,
    build_autoencoder,
    build_generator,
    build_pixel_decoder,
)
from .stages import Stage, training_of


def expected_bytes(stage: Stage) -> int:
    """About how many bytes the stage writes: a network and its checkpoints, latents, or images.

    It is 0 for stages that write a few small files.
    """
    recipe, training = stage.recipe, training_of(stage)
    if training:
        weights = 4 * sum(p.numel() for p in _network(stage).parameters())
        # A checkpoint holds the weights, AdamW's two moments and, where it is on, the average.
        copies = 4 if training.ema_decay else 3
        return weights * (1 + copies * training.keep_checkpoints)
    if stage.name == "latents":
        return stage.num_images * len(recipe.precompute.columns) * latent_bytes(recipe)
    if stage.name == "text-states":
        # As if every caption filled the length; `fae precompute-text --dry-run` counts tokens.
        spec = text_spec(recipe.text)
        return stage.num_images * spec.max_length * 2 * text_width(spec)
    if stage.name == "samples":
        # A PNG takes about two thirds of its pixels. Parquet holds one PNG, and each format adds a
        # copy: png another PNG, npz the pixels.
        pixels = stage.num_images * 3 * recipe.image_size**2
        formats = recipe.sample.formats
        return int(pixels * (2 / 3 + ("png" in formats) * 2 / 3 + ("npz" in formats)))
    return 0


def latent_bytes(recipe: Recipe) -> int:
    """Bytes of one column of one image in a latent store, float16 [C, H, W]."""
    channels, height, width = _latent_shape(recipe)
    return 2 * channels * height * width


def _latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    return (recipe.autoencoder.latent_dim, *backbone_spec(recipe).grid)


def _network(stage: Stage) -> nn.Module:
    """The network that the stage trains, on the meta device, which holds no weights."""
    recipe, spec = stage.recipe, backbone_spec(stage.recipe)
    with torch.device("meta"):
        if stage.name == "autoencoder":
            return build_autoencoder(recipe.autoencoder, spec)
        if stage.name == "generator":
            return build_generator(recipe.generator, _latent_shape(recipe), recipe.text)
        return build_pixel_decoder(recipe.pixel_decoder, spec, recipe.image_size)
