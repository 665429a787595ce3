"""The frozen visual encoder: canonical uint8 crops in, patch features out.

Any timm ViT by name. Resize, normalization and cast run on the module's own device, so only uint8
crosses processes. Presets name the encoders of arXiv 2512.07829 (DINOv2 and SigLIP2) and DINOv2's
smaller sizes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from fae_core.hashing import tensors_sha256
from fae_core.weights import WeightsError, load_weights


@dataclass(frozen=True)
class BackboneSpec:
    """A timm model and the side [px] of its input; `load_backbone` checks `dim` and `patch`."""

    timm_name: str
    image_size: int
    patch: int
    dim: int
    antialias_positions: bool = False
    """Whether resampling the position table is antialiased: DINOv2's authors do so for the models
    with registers only."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // self.patch, self.image_size // self.patch


def _dinov2(size: str, dim: int, registers: bool) -> BackboneSpec:
    middle = "_reg4" if registers else ""
    return BackboneSpec(f"vit_{size}_patch14{middle}_dinov2.lvd142m", 224, 14, dim, registers)


PRESETS = {
    "dinov2_vits14": _dinov2("small", 384, False),
    "dinov2_vitb14": _dinov2("base", 768, False),
    "dinov2_vitl14": _dinov2("large", 1024, False),
    "dinov2_vitg14": _dinov2("giant", 1536, False),
    "dinov2_vits14_reg": _dinov2("small", 384, True),
    "dinov2_vitb14_reg": _dinov2("base", 768, True),
    "dinov2_vitl14_reg": _dinov2("large", 1024, True),
    "dinov2_vitg14_reg": _dinov2("giant", 1536, True),
    "siglip2_b16": BackboneSpec("vit_base_patch16_siglip_256.v2_webli", 256, 16, 768),
    "siglip2_l16": BackboneSpec("vit_large_patch16_siglip_256.v2_webli", 256, 16, 1024),
    "siglip2_so400m16": BackboneSpec("vit_so400m_patch16_siglip_256.v2_webli", 256, 16, 1152),
    "siglip2_gopt16": BackboneSpec("vit_giantopt_patch16_siglip_256.v2_webli", 256, 16, 1536),
}


def resolve_spec(name: str, image_size: int | None = None) -> BackboneSpec:
    """The preset `name`, or a spec read off the timm ViT of that name.

    `image_size` [px], a multiple of the patch, replaces its own. Raises WeightsError.
    """
    spec = PRESETS.get(name) or _timm_spec(name)
    if image_size is None:
        return spec
    if image_size % spec.patch:
        raise WeightsError(
            f"Image size {image_size} is not a multiple of {name}'s patch, {spec.patch}."
        )
    return replace(spec, image_size=image_size)


def _timm_spec(name: str) -> BackboneSpec:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*PRESETS, *timm.list_models("vit_*")], n=3)
        raise WeightsError(
            f"No backbone {name!r}. Near it: {', '.join(near) or 'nothing'}. "
            f"Presets: {', '.join(PRESETS)}."
        )
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    if not hasattr(model, "patch_embed") or not hasattr(model, "num_prefix_tokens"):
        raise WeightsError(f"{name} is no ViT: it has no patch tokens.")
    size, patch = model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    return BackboneSpec(name, size, patch, model.embed_dim)


class Backbone(nn.Module):
    """A frozen ViT that always stays in eval mode. Build it with `load_backbone`."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: BackboneSpec, model: nn.Module, weights_sha256: str) -> None:
        super().__init__()
        config = resolve_model_data_config(model)
        self.spec = spec
        self.model: Any = model
        self.weights_sha256 = weights_sha256
        self.dim = spec.dim
        self.grid = spec.grid
        self.register_buffer(
            "mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Backbone:
        """Does nothing: the backbone stays in eval mode. Returns itself."""
        return self

    def preprocess(self, images: Tensor) -> Tensor:
        """The model's input [B, 3, size, size] float32 of uint8 crops [B, S, S, 3].

        Resized by antialiased bicubic interpolation, then normalized. Raises ValueError for images
        of another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"Expected uint8 images [B, S, S, 3], not {images.dtype} {tuple(images.shape)}."
            )
        return self.normalize(images.permute(0, 3, 1, 2).float() / 255.0)

    def normalize(self, x: Tensor) -> Tensor:
        """The model's input [B, 3, size, size] of images [B, 3, S, S] float32 in [0, 1].

        Differentiable in the images.
        """
        if x.shape[-1] != self.spec.image_size or x.shape[-2] != self.spec.image_size:
            size = (self.spec.image_size, self.spec.image_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(
                0.0, 1.0
            )
        return (x - self.mean) / self.std

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens [B, N, D] after each of `blocks`, which count from 0.

        `images` [B, 3, S, S] are float32 in [0, 1]. Differentiable in the images, for perceptual
        losses and discriminators.
        """
        tokens: list[Tensor] = self.model.forward_intermediates(
            self.normalize(images), indices=list(blocks), output_fmt="NLC", intermediates_only=True
        )
        return tokens

    @torch.no_grad()
    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch features [B, N, D] after the final norm, and the class token [B, D] or None.

        `images` are uint8 crops [B, S, S, 3].
        """
        x = self.model.forward_features(self.preprocess(images))
        num_prefix = self.model.num_prefix_tokens
        class_token = x[:, 0] if getattr(self.model, "cls_token", None) is not None else None
        return x[:, num_prefix:], class_token

    def forward(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of uint8 crops [B, S, S, 3]; no class or register tokens."""
        return self.tokens(images)[0]


def load_backbone(name: str, weights: str = "hub", image_size: int | None = None) -> Backbone:
    """The frozen backbone `name` with weights from `weights` (see `fae_core.weights`) on the CPU.

    `image_size` [px], a multiple of the patch, replaces the preset's; the position table is
    resampled to its grid. Raises WeightsError.
    """
    spec = resolve_spec(name, image_size)
    state = load_weights(spec.timm_name, weights)
    sha256 = tensors_sha256(state)
    model = _timm_model(spec)
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    if "pos_embed" in state:
        table = resample_abs_pos_embed(
            state["pos_embed"],
            list(spec.grid),
            num_prefix_tokens=num_prefix,
            antialias=spec.antialias_positions,
        )
        state = {**state, "pos_embed": table}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WeightsError(
            f"The weights {weights!r} do not fit {spec.timm_name}: {str(error)[:300]}"
        ) from None
    return Backbone(spec, model, sha256)


def untrained_backbone(spec: BackboneSpec) -> Backbone:
    """The backbone with timm's initial weights and without a hash: its shapes alone count."""
    return Backbone(spec, _timm_model(spec), weights_sha256="")


def _timm_model(spec: BackboneSpec) -> Any:
    model: Any = timm.create_model(spec.timm_name, img_size=spec.image_size, num_classes=0)
    if (model.embed_dim, model.patch_embed.patch_size[0]) != (spec.dim, spec.patch):
        raise WeightsError(f"{spec.timm_name} is {model.embed_dim} wide, not {spec.dim}.")
    return model
