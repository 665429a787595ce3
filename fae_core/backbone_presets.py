"""Frozen encoders by name: the timm model, the size of its input, its licence.

The paper's encoders (arXiv 2512.07829) are DINOv2 and SigLIP2. The others are those on which
autoencoders of features are trained elsewhere. `fae recipes --backbones` prints this table.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch

from fae_core.weights import WeightsError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of RGB in [0, 1]; without a value timm's own are used."""
    licence: str = ""
    """The licence of the weights as timm states it; empty where it is not known here."""
    layers: int = 1
    """Number of last blocks whose normalized outputs are summed."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // self.patch, self.image_size // self.patch


def _dinov2(size: str, dim: int, registers: bool) -> BackboneSpec:
    middle = "_reg4" if registers else ""
    name = f"vit_{size}_patch14{middle}_dinov2.lvd142m"
    return BackboneSpec(name, 224, 14, dim, registers, IMAGENET, "apache-2.0")


def _dinov3(size: str, dim: int) -> BackboneSpec:
    name = f"vit_{size}_patch16_dinov3.lvd1689m"
    return BackboneSpec(name, 256, 16, dim, normalization=IMAGENET, licence="dinov3-license")


def _mae(size: str, patch: int, dim: int) -> BackboneSpec:
    # 256 px is a grid of 16 x 16 as DINOv2's; the position table of 224 px is resampled.
    image_size = 16 * patch
    name = f"vit_{size}_patch{patch}_224.mae"
    return BackboneSpec(
        name, image_size, patch, dim, normalization=IMAGENET, licence="cc-by-nc-4.0"
    )


def _clip(size: str, patch: int, dim: int) -> BackboneSpec:
    name = f"vit_{size}_patch{patch}_clip_quickgelu_224.openai"
    return BackboneSpec(name, 224, patch, dim, normalization=CLIP, licence="apache-2.0")


def _pe_core(size: str, image_size: int, patch: int, dim: int) -> BackboneSpec:
    name = f"vit_pe_core_{size}_patch{patch}_{image_size}.fb"
    return BackboneSpec(name, image_size, patch, dim, normalization=HALF, licence="apache-2.0")


def _aimv2(size: str, dim: int) -> BackboneSpec:
    name = f"aimv2_{size}_patch14_224.apple_pt"
    return BackboneSpec(name, 224, 14, dim, normalization=CLIP, licence="apple-ascl")


def _eva02(size: str, data: str, dim: int) -> BackboneSpec:
    name = f"eva02_{size}_patch14_224.{data}"
    return BackboneSpec(name, 224, 14, dim, normalization=CLIP, licence="mit")


def _siglip2(size: str, image_size: int, dim: int) -> BackboneSpec:
    name = f"vit_{size}_patch16_siglip_{image_size}.v2_webli"
    return BackboneSpec(name, image_size, 16, dim, normalization=HALF, licence="apache-2.0")


PRESETS = {
    "dinov2_vits14": _dinov2("small", 384, False),
    "dinov2_vitb14": _dinov2("base", 768, False),
    "dinov2_vitl14": _dinov2("large", 1024, False),
    "dinov2_vitg14": _dinov2("giant", 1536, False),
    "dinov2_vits14_reg": _dinov2("small", 384, True),
    "dinov2_vitb14_reg": _dinov2("base", 768, True),
    "dinov2_vitl14_reg": _dinov2("large", 1024, True),
    "dinov2_vitg14_reg": _dinov2("giant", 1536, True),
    "siglip2_b16": _siglip2("base", 256, 768),
    "siglip2_l16": _siglip2("large", 256, 1024),
    "siglip2_so400m16": _siglip2("so400m", 256, 1152),
    "siglip2_gopt16": _siglip2("giantopt", 256, 1536),
    "siglip2_b16_384": _siglip2("base", 384, 768),
    "siglip2_l16_384": _siglip2("large", 384, 1024),
    "siglip2_so400m16_384": _siglip2("so400m", 384, 1152),
    "siglip2_gopt16_384": _siglip2("giantopt", 384, 1536),
    "dinov3_vits16": _dinov3("small", 384),
    "dinov3_vits16plus": _dinov3("small_plus", 384),
    "dinov3_vitb16": _dinov3("base", 768),
    "dinov3_vitl16": _dinov3("large", 1024),
    "dinov3_vith16plus": _dinov3("huge_plus", 1280),
    "dinov3_vit7b16": _dinov3("7b", 4096),
    "mae_vitb16": _mae("base", 16, 768),
    "mae_vitl16": _mae("large", 16, 1024),
    "mae_vith14": _mae("huge", 14, 1280),
    "clip_vitb16": _clip("base", 16, 768),
    "clip_vitl14": _clip("large", 14, 1024),
    "pe_core_b16": _pe_core("base", 224, 16, 768),
    "pe_core_l14": _pe_core("large", 336, 14, 1024),
    "pe_core_g14": _pe_core("gigantic", 448, 14, 1536),
    "aimv2_l14": _aimv2("large", 1024),
    "aimv2_h14": _aimv2("huge", 1536),
    "aimv2_1b14": _aimv2("1b", 2048),
    "aimv2_3b14": _aimv2("3b", 3072),
    "eva02_s14": _eva02("small", "mim_in22k", 384),
    "eva02_b14": _eva02("base", "mim_in22k", 768),
    "eva02_l14": _eva02("large", "mim_m38m", 1024),
}


def preset_rows(latent_dim: int) -> list[list[str]]:
    """Name, input [px], features, bytes of an image's latent, licence: of each preset, as text.

    Features are rows×columns×channels; a latent is one column of float16 of a store.
    """
    rows = []
    for name, spec in PRESETS.items():
        height, width = spec.grid
        features = f"{height}×{width}×{spec.dim}"
        num_bytes = 2 * latent_dim * height * width
        rows.append([name, str(spec.image_size), features, f"{num_bytes:,}", spec.licence])
    return rows


def backbone_label(name: str, image_size: int | None = None, layers: int = 1) -> str:
    """The backbone as fingerprints name it: name, @image_size where set, +layers where not 1."""
    size = "" if image_size is None else f"@{image_size}"
    return f"{name}{size}" + (f"+{layers}layers" if layers != 1 else "")


def parse_backbone_label(label: str) -> tuple[str, int | None, int]:
    """The name, image size and number of layers that `backbone_label` wrote."""
    label, _, layers = label.partition("+")
    name, _, size = label.partition("@")
    return name, int(size) if size else None, int(layers.removesuffix("layers") or 1)


def resolve_spec(name: str, image_size: int | None = None, layers: int = 1) -> BackboneSpec:
    """The preset `name`, or a spec read off the timm ViT of that name.

    `image_size` [px], a multiple of the patch, replaces its own; `layers` last blocks are summed.
    Without an image size a raw timm name warns
    where a preset runs the same model at another size. Raises WeightsError.
    """
    spec = PRESETS.get(name) or _timm_spec(name, warn=image_size is None)
    if image_size is None:
        return replace(spec, layers=layers)
    if image_size % spec.patch:
        raise WeightsError(
            f"Image size {image_size} is not a multiple of {name}'s patch, {spec.patch}."
        )
    return replace(spec, image_size=image_size, layers=layers)


def _timm_spec(name: str, warn: bool) -> BackboneSpec:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*PRESETS, *timm.list_models("vit_*")], n=3)
        raise WeightsError(
            f"No backbone {name!r}. Near it: {', '.join(near) or 'nothing'}. "
            f"Presets: {', '.join(PRESETS)}."
        )
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    patches: Any = getattr(model, "patch_embed", None)
    if getattr(patches, "patch_size", None) is None or not hasattr(model, "num_prefix_tokens"):
        raise WeightsError(f"{name} is no ViT: it has no patch tokens.")
    if not hasattr(model, "blocks") or not hasattr(model, "forward_intermediates"):
        raise WeightsError(f"{name} is no plain ViT: it has no sequence of blocks.")
    size, patch = patches.img_size[0], patches.patch_size[0]
    spec = BackboneSpec(name, size, patch, model.embed_dim)
    if warn:
        _warn_of_size(spec)
    return spec


def _warn_of_size(spec: BackboneSpec) -> None:
    """Warn where presets of the same model run at other sizes than the raw name does."""
    full = spec.timm_name
    same = [
        f"{name} ({preset.image_size} px, {preset.grid[0]}×{preset.grid[1]})"
        for name, preset in PRESETS.items()
        if preset.timm_name in (full, f"{full}.{preset.timm_name.partition('.')[2]}")
        and preset.image_size != spec.image_size
    ]
    if same:
        rows, columns = spec.grid
        warnings.warn(
            f"backbone.name={full} runs at {spec.image_size} px, a grid of {rows}×{columns}. "
            f"The preset of this model is {' or '.join(same)}; backbone.image_size sets a size.",
            stacklevel=3,
        )
