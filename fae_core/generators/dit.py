"""The diffusion transformer: SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423).

The input is latents [B, C, H, W], times and classes, the output a velocity [B, C, H, W]. The two
differ in three settings: SiT has LayerNorm, a GELU MLP and fixed positions only; LightningDiT has
RMSNorm, SwiGLU and, in addition, rotary positions. FAE's generator is LightningDiT-XL/1 at 32
channels, 675.26 M parameters (arXiv 2512.07829, appendix D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from fae_core.attention import attention
from fae_core.generators.latent_model import LatentModel
from fae_core.layers import (
    RMSNorm,
    SwiGLU,
    apply_rope,
    init_linear,
    patchify,
    rope_table,
    sincos_position_table,
    split_heads,
    unpatchify,
)

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and number of heads of DiT's sizes (arXiv 2212.09748, table 1)."""

NUM_FREQUENCIES = 256


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. `grid` is the latent's height and width.

    With `num_classes` 0 there is only the null class, and no guidance.
    """

    latent_dim: int
    grid: tuple[int, int]
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 1
    mlp_ratio: float = 4.0
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    rope: bool = True
    qk_norm: bool = False
    num_classes: int = 1000
    label_dropout: float = 0.1
    """Share of training labels replaced by the null class. It is not in the FAE paper; 0.1 is the
    value of DiT and LightningDiT."""
    checkpoint_activations: bool = False

    @classmethod
    def preset(
        cls, size: str, latent_dim: int, grid: tuple[int, int], **changes: object
    ) -> DiTConfig:
        """LightningDiT of size S, B, L or XL. Raises ValueError for another."""
        if size not in SIZES:
            raise ValueError(f"No DiT size {size!r}; there are {', '.join(SIZES)}.")
        width, depth, num_heads = SIZES[size]
        shape = {"width": width, "depth": depth, "num_heads": num_heads}
        return cls(latent_dim, grid, **{**shape, **changes})  # type: ignore[arg-type]


class GELUTanh(nn.GELU):
    """GELU in its tanh approximation, which DiT uses."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class TimestepEmbedding(nn.Module):
    """Embeddings [B, width] of times [B] in [0, 1]: 256 cosines and sines, then two layers.

    As in DiT's code.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        half = NUM_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float64) / half
        frequencies = torch.exp(-math.log(10000.0) * exponents).float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN's affine map x·(1 + scale) + shift of tokens x [B, N, D] by shift and scale [B, D]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def make_norm(kind: str, width: int) -> nn.Module:
    """RMSNorm with a gain for `rmsnorm` (LightningDiT), else LayerNorm without parameters (SiT)."""
    if kind == "rmsnorm":
        return RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class DiTBlock(nn.Module):
    """Attention and MLP, each with adaLN-zero: shift and scale before it, a gate after it."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        if width % config.num_heads:
            raise ValueError(f"Width {width} is not divisible by {config.num_heads} heads.")
        self.num_heads = config.num_heads
        self.rope = config.rope
        head_dim = width // config.num_heads
        self.norm_attention = make_norm(config.norm, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.output = nn.Linear(width, width)
        self.norm_mlp = make_norm(config.norm, width)
        if config.mlp == "swiglu":
            self.mlp: nn.Module = SwiGLU(width, config.mlp_ratio)
        else:
            hidden = int(width * config.mlp_ratio)
            self.mlp = Mlp(width, hidden, act_layer=GELUTanh)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        values = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = values
        h = modulate(self.norm_attention(x), shift_attention, scale_attention)
        q, k, v = split_heads(self.qkv(h), self.num_heads)
        q, k = self.norm_q(q), self.norm_k(k)
        if self.rope:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_attention[:, None] * self.output(attended)
        h = modulate(self.norm_mlp(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.mlp(h)


class DiT(LatentModel):
    """velocity = model(latents, t, labels). Class `num_classes` is the null class of guidance."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config.latent_dim)
        self.config = config
        patch, width = config.patch_size, config.width
        if config.grid[0] % patch or config.grid[1] % patch:
            raise ValueError(
                f"The latent's grid {config.grid} does not divide into patches of {patch}."
            )
        self.tokens = (config.grid[0] // patch, config.grid[1] // patch)
        token_dim = config.latent_dim * patch * patch
        self.input = nn.Linear(token_dim, width)
        self.position = nn.Parameter(sincos_position_table(width, self.tokens), requires_grad=False)
        self.time = TimestepEmbedding(width)
        self.label = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm = make_norm(config.norm, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, token_dim)
        cos, sin = rope_table(width // config.num_heads, self.tokens)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """As DiT: Xavier for linear layers, std 0.02 for embeddings, 0 for adaLN and the output."""
        self.apply(init_linear)
        nn.init.normal_(self.label.weight, std=0.02)
        for layer in self.time.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self):
            nn.init.zeros_(module.modulation.weight)
            nn.init.zeros_(module.modulation.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.config.num_classes

    def patchify(self, latents: Tensor) -> Tensor:
        """Tokens [B, N, C*p*p] of latents [B, C, H, W]."""
        return patchify(latents, self.config.patch_size)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Latents [B, C, H, W] of tokens [B, N, C*p*p]."""
        return unpatchify(tokens, self.config.patch_size, self.tokens)

    def forward(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Velocity [B, C, H, W] of latents [B, C, H, W] at times t [B] for labels int64 [B].

        Times are in [0, 1]; 1 is noise.
        """
        x = self.input(self.patchify(latents)) + self.position
        condition = self.time(t) + self.label(labels)
        for block in self.blocks:
            if self.config.checkpoint_activations and self.training:
                x = recompute(
                    block, x, condition, self.rope_cos, self.rope_sin, use_reentrant=False
                )
            else:
                x = block(x, condition, self.rope_cos, self.rope_sin)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.unpatchify(self.output(modulate(self.norm(x), shift, scale)))


def drop_labels(labels: Tensor, dropped: Tensor, null_class: int) -> Tensor:
    """Labels int64 [B] with the null class where `dropped`, bool [B], is true.

    These train the unconditional model of guidance.
    """
    return torch.where(dropped, torch.full_like(labels, null_class), labels)
