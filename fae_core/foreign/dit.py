"""Generators of SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423) as DiT.

Their networks are DiT's with other names. Three things differ and are folded into the weights: time
there runs from the noise at 0 to the data at 1, so that velocities have the other sign; a token's
output is ordered by place before channel; and a network that also predicts variances (SiT-XL/2 as
published) has twice the output channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fae_core.foreign.tensors import ForeignError, Remaining
from fae_core.generators.dit import SIZES, DiT, DiTConfig, TimestepEmbedding
from fae_core.layers import rope_table

HEADS = {width: heads for width, _, heads in SIZES.values()} | {1536: 24, 1792: 28}
"""Number of heads by width, of DiT's sizes and of LightningDiT's 1p0B and 1p6B: without rotary
positions the tensors do not tell it."""

IMAGENET_CLASSES = 1000


def dit_generator(
    tensors: Mapping[str, Tensor],
    source: str,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> DiT:
    """The generator in eval mode, on latents that are normalized as in its training.

    `tensors` are by their names there. `num_heads` is that of the known sizes by default, and
    `num_classes` one less than the label embeddings, of which the last is the null class; exactly
    1000 embeddings are ImageNet's without one. Raises ForeignError, which names `source`, for
    tensors that no DiT can hold.
    """
    rest = Remaining(tensors, source)
    patches = rest.take("x_embedder.proj.weight")
    width, channels, patch = patches.shape[:3]
    position = rest.take("pos_embed")[0]
    side = math.isqrt(len(position))
    labels = rest.take("y_embedder.embedding_table.weight")
    if num_classes is None:
        num_classes = len(labels) - (len(labels) != IMAGENET_CLASSES)
    if len(labels) not in (num_classes, num_classes + 1) or side * side != len(position):
        raise ForeignError(
            f"{source} has {len(labels)} label embeddings and {len(position)} tokens; expected "
            f"{num_classes} or {num_classes + 1} embeddings (--num-classes) and a square of tokens."
        )
    has_null = len(labels) == num_classes + 1
    heads = num_heads or _num_heads(tensors, width, source)
    config = DiTConfig(
        channels,
        (side * patch, side * patch),
        width=width,
        depth=rest.count("blocks."),
        num_heads=heads,
        patch_size=patch,
        rope="feat_rope.freqs_cos" in rest,
        qk_norm="blocks.0.attn.q_norm.weight" in rest,
        num_classes=num_classes,
        label_dropout=0.1 if has_null else 0.0,
        norm="rmsnorm" if "blocks.0.norm1.weight" in rest else "layernorm",
        **_mlp(tensors, width),
    )
    if config.rope:
        _check_rope(rest, width // heads, side)
    state = {
        "input.weight": patches.flatten(1),
        "input.bias": rest.take("x_embedder.proj.bias"),
        "position": position,
        **rest.affine("t_embedder.mlp.0", "time.layers.0"),
        **rest.affine("t_embedder.mlp.2", "time.layers.2"),
        "label.weight": labels if has_null else torch.cat([labels, torch.zeros(1, width)]),
        **_norm(rest, config, "final_layer.norm_final", "norm"),
        **rest.affine("final_layer.adaLN_modulation.1", "modulation"),
    }
    state["time.layers.0.weight"] = _reversed_time(state["time.layers.0.weight"])
    for part in ("weight", "bias"):
        output = rest.take(f"final_layer.linear.{part}")
        state[f"output.{part}"] = -_channels_first(output, patch, channels, source)
    for index in range(config.depth):
        state |= _block(rest, config, f"blocks.{index}")
    rest.finish()
    generator = DiT(config)
    try:
        generator.load_state_dict({**generator.state_dict(), **state}, strict=True)
    except RuntimeError as error:
        raise ForeignError(f"{source} does not fit a DiT of {config}: {error}") from None
    return generator.eval()


def _num_heads(tensors: Mapping[str, Tensor], width: int, source: str) -> int:
    for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if name in tensors:
            return width // tensors[name].shape[-1]
    if width not in HEADS:
        raise ForeignError(
            f"{source}: the number of attention heads is not in the file, and {width} is the width "
            "of no known size. Give --num-heads."
        )
    return HEADS[width]


def _mlp(tensors: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """Kind of the MLP, and a ratio that gives its hidden width."""
    if (output := tensors.get("blocks.0.mlp.w3.weight")) is not None:
        hidden, kind, share = output.shape[1], "swiglu", 2 / 3
    else:
        output = tensors.get("blocks.0.mlp.fc2.weight")
        hidden, kind, share = (0 if output is None else output.shape[1]), "gelu", 1.0
    # A half more, because the width is rounded down.
    ratio = 4.0 if hidden == int(width * 4.0 * share) else (hidden + 0.5) / (width * share)
    return {"mlp": kind, "mlp_ratio": ratio}


def _check_rope(rest: Remaining, head_dim: int, side: int) -> None:
    """Raises ForeignError where the stored rotary positions are not those that DiT computes."""
    expected = rope_table(head_dim, (side, side))
    found = [rest.take(f"feat_rope.{name}") for name in ("freqs_cos", "freqs_sin")]
    for ours, theirs in zip(expected, found, strict=True):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-3):
            raise ForeignError(
                f"{rest.source} has rotary positions of another kind than LightningDiT's."
            )


def _norm(rest: Remaining, config: DiTConfig, theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": rest.take(f"{theirs}.weight")} if config.norm == "rmsnorm" else {}


def _block(rest: Remaining, config: DiTConfig, block: str) -> dict[str, Tensor]:
    """The tensors of one block; it has the same name here."""
    if f"{block}.attn.q_norm.bias" in rest:
        raise ForeignError(
            f"{rest.source} normalizes queries and keys by LayerNorm; DiT here does by RMSNorm."
        )
    names = {"attn.qkv": "qkv", "attn.proj": "output"}
    swiglu = {"mlp.w12": "mlp.gate_and_value", "mlp.w3": "mlp.output"}
    names |= swiglu if config.mlp == "swiglu" else {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    state = {
        **_norm(rest, config, f"{block}.norm1", f"{block}.norm_attention"),
        **_norm(rest, config, f"{block}.norm2", f"{block}.norm_mlp"),
    }
    for theirs, ours in names.items():
        state |= rest.affine(f"{block}.{theirs}", f"{block}.{ours}")
    if config.qk_norm:
        for part in "qk":
            name = f"{block}.norm_{part}.weight"
            state[name] = rest.take(f"{block}.attn.{part}_norm.weight")
    for part in ("weight", "bias"):
        values = rest.take(f"{block}.adaLN_modulation.1.{part}")
        if len(values) == 4 * config.width:  # LightningDiT's wo_shift
            scale_and_gate = values.unflatten(0, (2, 2, config.width))
            shift = torch.zeros_like(scale_and_gate[:, :1])
            values = torch.cat([shift, scale_and_gate], dim=1).flatten(0, 2)
        state[f"{block}.modulation.{part}"] = values
    return state


def _reversed_time(weight: Tensor) -> Tensor:
    """The first layer [D, 256] of the time's embedding, for 1 - t in the place of t.

    cos((1-t)f) = cos f·cos tf + sin f·sin tf, and sin((1-t)f) = sin f·cos tf - cos f·sin tf: the
    layer takes cosines and sines together, so a rotation of its columns reverses the time.
    """
    frequencies = TimestepEmbedding(1).frequencies.double()
    by_cos, by_sin = weight.double().chunk(2, dim=1)
    cos, sin = frequencies.cos(), frequencies.sin()
    return torch.cat([by_cos * cos + by_sin * sin, by_cos * sin - by_sin * cos], dim=1).float()


def _channels_first(output: Tensor, patch: int, channels: int, source: str) -> Tensor:
    """Rows of the last layer ordered by channel before place; predicted variances are left out."""
    places = patch * patch
    if len(output) not in (places * channels, 2 * places * channels):
        raise ForeignError(
            f"{source} predicts {len(output)} values for a token of {patch}×{patch} cells and "
            f"{channels} channels."
        )
    by_place = output.unflatten(0, (places, -1))[:, :channels]
    return by_place.transpose(0, 1).flatten(0, 1)
