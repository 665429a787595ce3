"""The networks that a recipe names, loaded from local paths, S3 or the Hub, and checked to fit.

A checkpoint is named by its .safetensors file, or by the folder that holds it: a finished run's, or
one that `fae publish` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fae_core import checkpoint
from fae_core.backbone import Backbone, load_backbone
from fae_core.backbone_presets import backbone_label
from fae_core.checkpoint import CheckpointError, Loaded
from fae_core.precision import autocast

from ..config import Recipe
from ..storage import paths


def load_checkpoint(uri: str, *kinds: str) -> Loaded:
    """A checkpoint of one of `kinds`, of any kind without them.

    `uri` is a local path, an s3:// or an hf:// address: a .safetensors file, or a folder with one.
    Raises CheckpointError.
    """
    with paths.local_copy(_file_of(uri, kinds or tuple(checkpoint.FILES))) as path:
        return checkpoint.load(path, *kinds)


def _file_of(uri: str, kinds: tuple[str, ...]) -> str:
    """The .safetensors file that `uri` is or holds. Raises CheckpointError."""
    if not paths.is_remote(uri):
        uri = paths.filesystem(uri)[1]
    if uri.endswith(".safetensors") or Path(uri).is_file():
        return uri
    names = list(dict.fromkeys(checkpoint.FILES[kind] for kind in kinds))
    there = [name for name in names if paths.exists(paths.join(uri, name))]
    if len(there) != 1:
        found = ", ".join(there) or "nothing of the kind"
        raise CheckpointError(
            f"{uri}: expected a .safetensors file, or the folder of a finished run or of "
            f"`fae publish` with one of {', '.join(names)}; found {found}."
        )
    return paths.join(uri, there[0])


def backbone_of(recipe: Recipe) -> Backbone:
    """The recipe's frozen backbone on the CPU. Raises WeightsError."""
    section = recipe.backbone
    return load_backbone(section.name, section.weights, section.image_size, section.layers)


def backbone_fingerprints(recipe: Recipe, backbone: Backbone) -> dict[str, str]:
    """What decides an image's features: backbone, its weights, its input size and summed
    layers, the crop's size.
    """
    section = recipe.backbone
    label = backbone_label(section.name, section.image_size, section.layers)
    return {
        "backbone": f"{label}:{backbone.weights_sha256}",
        "image_size": str(recipe.image_size),
    }


def check_fingerprints(uri: str, loaded: Loaded, expected: Mapping[str, str]) -> None:
    """Raises CheckpointError with what the checkpoint was trained with and what is here."""
    for part, value in expected.items():
        theirs = loaded.fingerprints.get(part)
        if theirs != value:
            raise CheckpointError(f"{uri} was trained with {part} {theirs}, here it is {value}.")


def autoencoder_of(recipe: Recipe, backbone: Backbone) -> Loaded:
    """The recipe's trained autoencoder. Raises CheckpointError when it is another backbone's."""
    (uri,) = recipe.require("encoding", "autoencoder.checkpoint")
    loaded = load_checkpoint(uri, "autoencoder")
    check_fingerprints(uri, loaded, backbone_fingerprints(recipe, backbone))
    if loaded.module.config.grid != backbone.grid:
        raise CheckpointError(
            f"{uri}: its grid {loaded.module.config.grid} is not the backbone's {backbone.grid}."
        )
    return loaded


def features_of(backbone: Backbone, images: Tensor, precision: str) -> Tensor:
    """Patch features [B, N, D] float32 of uint8 crops, computed in `precision`."""
    with autocast(precision, images.device):
        return backbone(images).float()
