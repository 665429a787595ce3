"""`fae import`: networks that others trained, as the checkpoints that every command here reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fae_core import checkpoint
from fae_core.backbone import load_backbone
from fae_core.backbone_presets import PRESETS, backbone_label, resolve_spec
from fae_core.foreign.dit import dit_generator
from fae_core.foreign.rae import decoder_tensors, num_patches, rae_decoder
from fae_core.foreign.tensors import ForeignError, Remaining, read_tensors
from fae_core.pixel_decoder import RAE_SIZES, PixelDecoder

from ..networks import load_checkpoint
from ..storage import paths

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
RAE_BACKBONES = {
    ("dinov2", 384): "dinov2_vits14_reg",
    ("dinov2", 768): "dinov2_vitb14_reg",
    ("dinov2", 1024): "dinov2_vitl14_reg",
    ("siglip2", 768): "siglip2_b16",
    ("siglip2", 1024): "siglip2_l16",
    ("siglip2", 1152): "siglip2_so400m16",
    ("mae", 768): "mae_vitb16",
    ("mae", 1024): "mae_vitl16",
}
"""Preset by diffusers' `encoder_type` and `encoder_hidden_size`."""

SIT_MULTIPLIER = 0.18215
"""What SiT multiplies SD-VAE's latents by; LightningDiT has statistics instead."""
NO_AUTOENCODER = "none of this project"
"""The fingerprint of the autoencoder of an imported generator that was not given one."""


def import_rae(
    source: str,
    output: str,
    backbone: str | None = None,
    backbone_weights: str = "hub",
    num_heads: int | None = None,
) -> str:
    """Write RAE's decoder `source` as the pixel decoder `output`; says what it is, for people.

    `source` is one of RAE's .pt files, which needs the name of its `backbone`, or a folder of
    diffusers' AutoencoderRAE, whose config names it: a local path, an address, or OWNER/NAME on the
    Hub. The backbone's weights (`backbone_weights` as
    `backbone.weights` of a recipe) are needed for its last norm and its fingerprint. Raises
    ForeignError, WeightsError and StorageError.
    """
    _check_output(output)
    uri = paths.address_of(source)
    config: Mapping[str, Any] = {}
    weights_uri = uri
    if paths.exists(paths.join(uri, "config.json")):
        config = _autoencoder_rae_config(uri, num_heads)
        weights_uri = paths.join(uri, DIFFUSERS_WEIGHTS)
        num_heads = int(config["decoder_num_attention_heads"])
    with _tensors(weights_uri) as tensors:
        decoder = decoder_tensors(tensors, uri)
        name = backbone or _backbone_of(config, uri)
        image_size = _backbone_image_size(name, _patches(config) or num_patches(decoder), uri)
        frozen = load_backbone(name, backbone_weights, image_size)
        module = rae_decoder(
            decoder, frozen, uri, num_heads, *_pixel_statistics(tensors if config else {})
        )
    fingerprints = {
        "backbone": f"{backbone_label(name, image_size)}:{frozen.weights_sha256}",
        "image_size": str(module.config.image_size),
        "imported": f"rae:{Path(uri).name}",
    }
    _save(output, module, fingerprints)
    return f"{output}: {_described(module, backbone_label(name, image_size))}"


def import_generator(
    source: str,
    output: str,
    layout: str,
    stats: str | None = None,
    multiplier: float | None = None,
    autoencoder: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> str:
    """Write the generator `source` as the checkpoint `output`; says what it is, for people.

    `layout` is `lightningdit` or `sit`. Normalized latents there are (raw - mean) / std times the
    `multiplier`, which is 1 and 0.18215 by default; `stats` is LightningDiT's latents_stats.pt.
    `autoencoder` is the checkpoint here whose latents they are; without it the generator's latents
    cannot be decoded here. Raises ForeignError, CheckpointError and StorageError.
    """
    _check_output(output)
    if layout == "lightningdit" and stats is None and multiplier is None:
        raise ForeignError(
            "LightningDiT keeps the mean and standard deviation of latents beside the data, not in "
            "the checkpoint: give --stats latents_stats.pt, or --multiplier where the latents were "
            "only scaled (latent_norm: false)."
        )
    uri = paths.address_of(source)
    with _tensors(uri) as tensors:
        generator = dit_generator(tensors, uri, num_heads, num_classes)
    config = generator.config
    mean, std = torch.zeros(config.latent_dim), torch.ones(config.latent_dim)
    if stats is not None:
        mean, std = _latent_statistics(stats, config.latent_dim)
    default = SIT_MULTIPLIER if layout == "sit" and stats is None else 1.0
    generator.set_latent_stats(mean, std / (multiplier or default))
    fingerprints = {"autoencoder": NO_AUTOENCODER, "imported": f"{layout}:{Path(uri).name}"}
    if autoencoder is not None:
        made = load_checkpoint(paths.address_of(autoencoder), "autoencoder")
        shape = (made.module.config.latent_dim, made.module.config.grid)
        if shape != (config.latent_dim, config.grid):
            raise ForeignError(
                f"{uri} makes latents of {config.latent_dim} channels on a grid of {config.grid}; "
                f"{autoencoder} has {shape[0]} on {shape[1]}."
            )
        fingerprints["autoencoder"] = made.weights_sha256
    _save(output, generator, fingerprints)
    rows, columns = config.grid
    guided = "" if config.label_dropout else ", without a null class and so without guidance"
    return (
        f"{output}: generator of {config.num_classes} classes, latents {config.latent_dim}×{rows}×"
        f"{columns}, {config.width} wide, {config.depth} blocks{guided}"
    )


def _latent_statistics(name: str, num_channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of LightningDiT's latents_stats.pt."""
    uri = paths.address_of(name)
    with _tensors(uri) as found:
        rest = Remaining(found, uri)
        mean, std = rest.take("mean").flatten(), rest.take("std").flatten()
    if not len(mean) == len(std) == num_channels:
        raise ForeignError(
            f"{uri} has statistics of {len(mean)} channels; the generator has {num_channels}."
        )
    return mean, std


def _check_output(output: str) -> None:
    if not output.endswith(".safetensors"):
        raise ForeignError(f"--output {output}: give the name of a .safetensors file.")


def _autoencoder_rae_config(uri: str, num_heads: int | None) -> dict[str, Any]:
    try:
        config = dict(json.loads(paths.read_bytes(paths.join(uri, "config.json"))))
    except (ValueError, TypeError):
        raise ForeignError(f"{uri}: its config.json is no configuration of a model.") from None
    if config.get("_class_name") != "AutoencoderRAE":
        raise ForeignError(
            f"{uri} is a {config.get('_class_name') or 'model'} by its config.json; expected "
            "AutoencoderRAE of diffusers, or one of RAE's .pt files."
        )
    if num_heads is not None:
        config["decoder_num_attention_heads"] = num_heads
    needed = ("decoder_num_attention_heads", "encoder_input_size", "encoder_patch_size")
    if absent := [key for key in needed if not isinstance(config.get(key), int)]:
        raise ForeignError(
            f"{uri}: its config.json has no number for {', '.join(absent)}. Another version of "
            "diffusers may have written it; those that were tried are 0.42 and later."
        )
    return config


@contextmanager
def _tensors(uri: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of the file `uri`, while there is a local copy of it."""
    if not paths.exists(uri):
        raise ForeignError(f"{uri}: there is no such file.")
    with paths.local_copy(uri) as path:
        if path.is_dir():
            raise ForeignError(f"{uri} is a folder without config.json; name the file in it.")
        yield read_tensors(path)


def _backbone_of(config: Mapping[str, Any], uri: str) -> str:
    key = (config.get("encoder_type"), config.get("encoder_hidden_size"))
    if key not in RAE_BACKBONES:
        raise ForeignError(
            f"{uri} does not say which backbone it decodes. Give --backbone, a preset of "
            f"`fae recipes --backbones`; RAE's are {', '.join(RAE_BACKBONES.values())}."
        )
    return RAE_BACKBONES[key]


def _patches(config: Mapping[str, Any]) -> int | None:
    if not config:
        return None
    return int(config["encoder_input_size"] // config["encoder_patch_size"]) ** 2


def _backbone_image_size(name: str, patches: int | None, uri: str) -> int | None:
    """The input [px] at which the backbone has so many patches; None where it is its own."""
    spec = PRESETS.get(name) or resolve_spec(name)
    if patches is None or patches == spec.grid[0] * spec.grid[1]:
        return None
    side = math.isqrt(patches)
    if side * side != patches:
        raise ForeignError(f"{uri} decodes {patches} patches, which are no square.")
    return side * spec.patch


def _pixel_statistics(tensors: Mapping[str, Tensor]) -> Sequence[list[float] | None]:
    """Mean and standard deviation of RGB, where the autoencoder stores them."""
    names = ("encoder_mean", "encoder_std")
    return [tensors[n].float().flatten().tolist() if n in tensors else None for n in names]


def _save(output: str, module: nn.Module, fingerprints: Mapping[str, str]) -> None:
    with paths.writing(output) as path:
        checkpoint.save(path, module, fingerprints)


def _described(decoder: PixelDecoder, backbone: str) -> str:
    """The decoder's shape, and the keys with which training starts from it."""
    config = decoder.config
    shape = (config.width, config.depth, config.num_heads, config.mlp_width)
    size = next((name for name, known in RAE_SIZES.items() if known == shape), None)
    keys = [f"pixel_decoder.size={size or 'RAE-XL'}"]
    if size is None:
        names = ("width", "depth", "num_heads", "mlp_width")
        keys += [f"pixel_decoder.{n}={v}" for n, v in zip(names, shape, strict=True)]
    side = config.image_size
    return (
        f"decoder of {backbone} to images of {side}×{side} px, {config.width} wide, "
        f"{config.depth} blocks. Recipes that start from it: {' '.join(keys)}"
    )
