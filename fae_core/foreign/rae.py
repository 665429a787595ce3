"""RAE's decoders (arXiv 2510.11690) as PixelDecoder: a ViT-MAE decoder with a class token.

RAE's own files and the folders of diffusers' AutoencoderRAE name their tensors differently. Three
things that are outside the network there are folded into it here: RAE's encoder drops the weight
and bias of the backbone's last norm, which the features here have; its images are normalized as
the encoder's input is; and the last layer orders pixels by place before colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fae_core.backbone import Backbone
from fae_core.foreign.tensors import ForeignError, Remaining
from fae_core.layers import sincos_position_table
from fae_core.pixel_decoder import RAE_SIZES, PixelDecoder, PixelDecoderConfig

ATTENTION_OF_RAE = ("attention.query", "attention.key", "attention.value", "output.dense")
ATTENTION_OF_DIFFUSERS = ("to_q", "to_k", "to_v", "to_out.0")
"""Names of the queries, keys, values and output of a layer's attention."""

NORM_EPS = 1e-12
HEADS = {width: heads for width, _, heads, _ in RAE_SIZES.values()}
"""Number of heads by width: the tensors do not tell it."""


def decoder_tensors(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Those of the decoder, without prefix, of a whole RAE or of a decoder alone.

    `source` is named in errors. Raises ForeignError where there is no decoder.
    """
    prefix = "decoder." if "decoder.decoder_embed.weight" in tensors else ""
    if f"{prefix}decoder_embed.weight" not in tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise ForeignError(
            f"{source} is no decoder of RAE: it has no decoder_embed.weight, but {some}, …"
        )
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def num_patches(tensors: Mapping[str, Tensor]) -> int | None:
    """Patches of the decoder's image, where its table of positions is stored."""
    table = tensors.get("decoder_pos_embed")
    return None if table is None else table.shape[1] - 1


def rae_decoder(
    tensors: Mapping[str, Tensor],
    backbone: Backbone,
    source: str,
    num_heads: int | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> PixelDecoder:
    """The decoder of the `backbone`'s features, in eval mode, from what `decoder_tensors` found.

    `num_heads` is that of RAE's sizes by default, `pixel_mean` and `pixel_std` of RGB in [0, 1] the
    backbone's. Raises ForeignError, which names `source`, where the tensors do not belong to this
    backbone or hold more than such a decoder.
    """
    rest = Remaining(tensors, source)
    embed = rest.take("decoder_embed.weight")
    width, feature_dim = embed.shape
    heads = num_heads or HEADS.get(width)
    if heads is None or width % heads:
        raise ForeignError(
            f"{source}: the number of attention heads is not in the file, and RAE has no decoder "
            f"of width {width} whose heads are known. Give --num-heads."
        )
    prediction = rest.take("decoder_pred.weight")
    patch = math.isqrt(prediction.shape[0] // 3)
    if feature_dim != backbone.dim:
        raise ForeignError(
            f"{source} decodes features of {feature_dim} channels; {backbone.spec.timm_name} has "
            f"{backbone.dim}."
        )
    position = _positions(rest, width, backbone)
    config = PixelDecoderConfig(
        feature_dim=feature_dim,
        grid=backbone.grid,
        image_size=patch * backbone.grid[0],
        width=width,
        depth=rest.count("decoder_layers."),
        num_heads=heads,
        mlp_width=len(tensors["decoder_layers.0.intermediate.dense.bias"]),
        class_token=True,
        norm_eps=NORM_EPS,
    )
    mean = backbone.mean.flatten() if pixel_mean is None else torch.tensor(pixel_mean)
    std = backbone.std.flatten() if pixel_std is None else torch.tensor(pixel_std)
    norm_bias, norm_weight = _last_norm(backbone)
    state = {
        "feature_mean": norm_bias,
        "feature_std": norm_weight,
        "input.weight": embed,
        "input.bias": rest.take("decoder_embed.bias"),
        "position": position[1:],
        "class_token": rest.take("trainable_cls_token") + position[0],
        **rest.affine("decoder_norm", "norm"),
        **_pixels(prediction, rest.take("decoder_pred.bias"), mean, std, patch),
    }
    by_diffusers = "decoder_layers.0.attention.to_q.weight" in rest
    *projections, out = ATTENTION_OF_DIFFUSERS if by_diffusers else ATTENTION_OF_RAE
    for index in range(config.depth):
        theirs, ours = f"decoder_layers.{index}", f"blocks.{index}"
        qkv = [rest.affine(f"{theirs}.attention.{name}", "") for name in projections]
        for part in ("weight", "bias"):
            state[f"{ours}.attn.qkv.{part}"] = torch.cat([layer[f".{part}"] for layer in qkv])
        for name, to in (
            (f"attention.{out}", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        ):
            state |= rest.affine(f"{theirs}.{name}", f"{ours}.{to}")
    rest.finish()
    decoder = PixelDecoder(config)
    decoder.load_state_dict(state, strict=True)
    return decoder.eval()


def _positions(rest: Remaining, width: int, backbone: Backbone) -> Tensor:
    """Position table [1 + N, width], the class token's first: the stored one, else diffusers'.

    diffusers stores none. It spreads 16 positions over the side of any grid; RAE counts patches.
    """
    if "decoder_pos_embed" not in rest:
        table = sincos_position_table(width, backbone.grid, spacing=16 / backbone.grid[0])
        return torch.cat([torch.zeros(1, width), table])
    table = rest.take("decoder_pos_embed")[0]
    rows, columns = backbone.grid
    if len(table) != 1 + rows * columns:
        raise ForeignError(
            f"{rest.source} decodes {len(table) - 1} patches; {backbone.spec.timm_name} at "
            f"{backbone.spec.image_size} px has a grid of {rows}×{columns}."
        )
    return table


def _last_norm(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Bias and weight [D] of the backbone's last norm. Raises ForeignError where it has none."""
    norm = getattr(backbone.model, "norm", None)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(norm, nn.LayerNorm) or weight is None or bias is None:
        raise ForeignError(
            f"{backbone.spec.timm_name} does not end with a LayerNorm, so RAE has no decoder of it."
        )
    if backbone.spec.layers != 1 or not bool((weight != 0).all()):
        raise ForeignError(
            f"RAE decodes the last normalized block of {backbone.spec.timm_name}; it cannot be "
            "recovered from sums of blocks, nor where the norm's weight is 0."
        )
    return bias.detach(), weight.detach()


def _pixels(
    weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor, patch: int
) -> dict[str, Tensor]:
    """The output layer that gives what RAE's gives times std plus mean, colour before place."""
    place_first = weight.unflatten(0, (patch, patch, 3))
    weight = (place_first * std[:, None]).permute(2, 0, 1, 3).flatten(0, 2)
    shifted = bias.unflatten(0, (patch, patch, 3)) * std + mean - 0.5  # PixelDecoder adds 0.5
    return {"output.weight": weight, "output.bias": shifted.permute(2, 0, 1).flatten()}
