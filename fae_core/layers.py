"""The transformer block of FAE's networks: RMSNorm, SwiGLU and rotary positions on a 2-D grid.

The paper names the three parts for its feature decoder (arXiv 2512.07829, appendix A). Their
arrangement (pre-norm, biased linear layers, SwiGLU at two thirds of the MLP ratio) is
LightningDiT's and gives the paper's parameter count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fae_core.attention import attention


def sincos_position_table(dim: int, grid: tuple[int, int], spacing: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine table [H*W, dim] float32 for a grid (H, W) of points `spacing` apart.

    The first half of the channels encodes the column, the second half the row. Raises ValueError
    where `dim` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"A 2-D sine-cosine table needs a width divisible by 4, not {dim}.")
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        *(spacing * torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    parts = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()


def rope_table(head_dim: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [H*W, head_dim] float32 of 2-D rotary positions on a grid (H, W).

    Rotary embedding of arXiv 2104.09864 with base 10000 along each axis: the first half of the
    channels encodes the row, the second half the column. Raises ValueError where `head_dim` is not
    divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need a head width divisible by 4, not {head_dim}.")
    frequencies = 1.0 / 10000 ** (
        torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2)
    )
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
    table = torch.cat([a.repeat_interleave(2, dim=1) for a in angles], dim=1)
    return table.cos().float(), table.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [..., N, head_dim] by the angles of `rope_table`."""
    pairs = x.unflatten(-1, (-1, 2))
    rotated = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, computed in the weight's precision and returned in the input's dtype.

    Autocast does not cast this norm, and torch has no fused kernel for bfloat16 input with float32
    weights: without the cast it runs half a dozen kernels instead of one.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return super().forward(wide).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated MLP of arXiv 2002.05202; the hidden width is two thirds of `ratio` times the width.

    It is rounded up to a multiple of `multiple_of`.
    """

    def __init__(
        self, dim: int, ratio: float = 4.0, bias: bool = True, multiple_of: int = 1
    ) -> None:
        super().__init__()
        hidden = -(-int(dim * ratio * 2 / 3) // multiple_of) * multiple_of
        self.gate_and_value = nn.Linear(dim, 2 * hidden, bias=bias)
        self.output = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block on tokens [B, N, dim]; N = H*W of the rotary table's grid."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Width {dim} is not divisible by {num_heads} heads.")
        self.num_heads = num_heads
        self.norm_attention = RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.norm_mlp = RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, mlp_ratio)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(self.norm_attention(x)), self.num_heads)
        attended = attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Tokens [B, N, C*p*p] of latents [B, C, H, W] for patches of p x p cells, row by row."""
    pieces = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return pieces.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Latents [B, C, H, W] of tokens [B, N, C*p*p] on `grid`, which counts patches."""
    pieces = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid)
    return pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values [B, heads, N, head_dim] of one projection [B, N, 3*heads*head_dim]."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers; pass it to `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def num_parameters(module: nn.Module) -> int:
    """All parameters, trained or frozen; buffers do not count."""
    return sum(math.prod(p.shape) for p in module.parameters())
