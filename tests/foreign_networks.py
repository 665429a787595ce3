"""SiT's and LightningDiT's networks, small and of random weights, by the names of their tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEADS, CHANNELS, SIDE, CLASSES = 48, 4, 3, 4, 5
Tensors = dict[str, Tensor]


def random_tensors(
    patch: int = 1,
    modern: bool = True,
    qk_norm: bool = False,
    shift: bool = True,
    variances: bool = False,
    null_class: bool = True,
) -> Tensors:
    """A checkpoint's tensors; `modern` is LightningDiT with all of its parts, else SiT."""
    generator = torch.Generator().manual_seed(0)
    found: Tensors = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        scale = 0.5 / math.sqrt(math.prod(shape[1:]))
        found[f"{name}.weight"] = scale * torch.randn(*shape, generator=generator)
        if bias:
            found[f"{name}.bias"] = 0.5 * torch.randn(shape[0], generator=generator)

    tokens = (SIDE // patch) ** 2
    add("x_embedder.proj", WIDTH, CHANNELS, patch, patch)
    add("t_embedder.mlp.0", WIDTH, 256)
    add("t_embedder.mlp.2", WIDTH, WIDTH)
    add("y_embedder.embedding_table", CLASSES + null_class, WIDTH, bias=False)
    found["pos_embed"] = torch.randn(1, tokens, WIDTH, generator=generator)
    for block in ("blocks.0", "blocks.1"):
        add(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        add(f"{block}.attn.proj", WIDTH, WIDTH)
        add(f"{block}.adaLN_modulation.1", (6 if shift else 4) * WIDTH, WIDTH)
        if qk_norm:
            add(f"{block}.attn.q_norm", WIDTH // HEADS, bias=False)
            add(f"{block}.attn.k_norm", WIDTH // HEADS, bias=False)
        if modern:
            add(f"{block}.norm1", WIDTH, bias=False)
            add(f"{block}.norm2", WIDTH, bias=False)
            hidden = int(2 / 3 * 4 * WIDTH)
            add(f"{block}.mlp.w12", 2 * hidden, WIDTH)
            add(f"{block}.mlp.w3", WIDTH, hidden)
        else:
            add(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
            add(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    if modern:
        add("final_layer.norm_final", WIDTH, bias=False)
        angles = rope_angles(patch).repeat_interleave(2, dim=1)
        found |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    add("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    add("final_layer.linear", patch**2 * CHANNELS * (1 + variances), WIDTH)
    return found


def rope_angles(patch: int) -> Tensor:
    """Angles [N, head_dim / 2]: of the row, then of the column."""
    quarter = WIDTH // HEADS // 4
    frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
    at = torch.arange(SIDE // patch).float()[:, None] * frequencies
    rows = at[:, None].expand(-1, len(at), -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=2).flatten(0, 1)


def theirs(w: Tensors, x: Tensor, t: Tensor, y: Tensor, patch: int = 1) -> Tensor:
    """Velocity from noise (t = 0) to data (t = 1) of their network with the tensors `w`."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" in w:
            return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], 1e-6)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def rotated(x: Tensor) -> Tensor:
        if "feat_rope.freqs_cos" not in w:
            return x
        turn = torch.polar(torch.ones(()), rope_angles(patch))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(
            -2
        )

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    c = linear("t_embedder.mlp.2", F.silu(time)) + w["y_embedder.embedding_table.weight"][y]
    for block in ("blocks.0", "blocks.1"):
        parts = linear(f"{block}.adaLN_modulation.1", F.silu(c))[:, None].split(WIDTH, dim=-1)
        zero = torch.zeros(())
        if len(parts) == 4:
            parts = (zero, parts[0], parts[1], zero, parts[2], parts[3])
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in linear(
                f"{block}.attn.qkv", norm(f"{block}.norm1", h) * (1 + scale) + shift
            ).chunk(3, dim=-1)
        )
        if f"{block}.attn.q_norm.weight" in w:
            q, k = norm(f"{block}.attn.q_norm", q), norm(f"{block}.attn.k_norm", k)
        attended = F.scaled_dot_product_attention(rotated(q), rotated(k), v)
        h = h + gate * linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        m = norm(f"{block}.norm2", h) * (1 + mlp_scale) + mlp_shift
        if f"{block}.mlp.w12.weight" in w:
            gates, values = linear(f"{block}.mlp.w12", m).chunk(2, dim=-1)
            h = h + mlp_gate * linear(f"{block}.mlp.w3", F.silu(gates) * values)
        else:
            hidden = F.gelu(linear(f"{block}.mlp.fc1", m), approximate="tanh")
            h = h + mlp_gate * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    side = SIDE // patch
    pixels = out.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
    image = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image[:, :CHANNELS]  # what follows are predicted variances
