"""The frozen visual encoder: canonical uint8 crops in, patch features out.

Any timm ViT by name, or a preset of `fae_core.backbone_presets`. Resize, normalization and cast run
on the module's own device, so only uint8 crosses processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from fae_core.backbone_presets import BackboneSpec, resolve_spec
from fae_core.hashing import tensors_sha256
from fae_core.weights import WeightsError, load_weights


class Backbone(nn.Module):
    """A frozen ViT that always stays in eval mode. Build it with `load_backbone`."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: BackboneSpec, model: nn.Module, weights_sha256: str) -> None:
        super().__init__()
        config = resolve_model_data_config(model)
        mean, std = spec.normalization or (config["mean"], config["std"])
        self.spec = spec
        self.model: Any = model
        self.weights_sha256 = weights_sha256
        self.dim = spec.dim
        self.grid = spec.grid
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
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

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch features [B, N, D] after the final norm, and the class token [B, D] or None.

        `images` are uint8 crops [B, S, S, 3]. With `spec.layers` = k above 1 the features are the
        sum of the last k blocks' outputs, each after the model's final norm; the class token is
        always the last block's.
        """
        return self.input_tokens(self.preprocess(images))

    @torch.no_grad()
    def input_tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`tokens` of the model's input [B, 3, size, size], which `normalize` makes."""
        if self.spec.layers > 1:
            x, blocks = self.model.forward_intermediates(
                x, indices=self.spec.layers, norm=True, output_fmt="NLC"
            )
            patches = torch.stack(blocks).sum(dim=0)
        else:
            x = self.model.forward_features(x)
            patches = x[:, self.model.num_prefix_tokens :]
        class_token = x[:, 0] if getattr(self.model, "cls_token", None) is not None else None
        return patches, class_token

    def forward(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of uint8 crops [B, S, S, 3]; no class or register tokens."""
        return self.tokens(images)[0]


def load_backbone(
    name: str, weights: str = "hub", image_size: int | None = None, layers: int = 1
) -> Backbone:
    """The frozen backbone `name` with weights from `weights` (see `fae_core.weights`) on the CPU.

    `image_size` [px], a multiple of the patch, replaces the preset's; the position table is
    resampled to its grid. `layers` last blocks are summed. Raises WeightsError.
    """
    spec = resolve_spec(name, image_size, layers)
    model = _timm_model(spec)
    state = load_weights(spec.timm_name, weights)
    sha256 = tensors_sha256(state)
    num_prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
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
    own_size = model.pretrained_cfg["input_size"][-1]
    relative = any("relative_position_bias_table" in key for key in model.state_dict())
    if relative and spec.image_size != own_size:
        raise WeightsError(
            f"{spec.timm_name} has relative positions, which are not resampled here: it runs at "
            f"its own {own_size} px alone, not at backbone.image_size={spec.image_size}."
        )
    if spec.layers > len(model.blocks):
        raise WeightsError(
            f"backbone.layers={spec.layers}: {spec.timm_name} has {len(model.blocks)} blocks."
        )
    if spec.layers > 1 and isinstance(model.norm, nn.Identity):
        raise WeightsError(
            f"backbone.layers={spec.layers} sums normalized blocks, and {spec.timm_name} has no "
            "norm after its blocks. Set backbone.layers=1."
        )
    return model
