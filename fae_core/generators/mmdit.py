"""The multimodal diffusion transformer: a generator of latents whose condition is text.

Latents and text tokens are two streams with weights of their own, which attend to each other in
every block (SD3, arXiv 2403.03206). FAE's text-to-image model has 16 blocks of width 1024 and
603.46 M parameters, its larger one 24 of width 1536 and 2017.84 M (arXiv 2512.07829, appendix D).
The paper prints no more of the layout. The one here gives both numbers: projections of attention
and MLP without biases, SwiGLU rounded up to a multiple of 256, norms without parameters, and no
text output in the last block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from fae_core.attention import attention
from fae_core.generators.dit import TimestepEmbedding, modulate
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

HEAD_DIM = 64
HIDDEN_MULTIPLE = 256
SIZES = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1536, 24)}
"""Width and depth; a head has 64 channels. L and XL are the paper's, S and B are not in it."""


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of an MMDiT. `grid` is the latent's height and width, `text_dim` the states' width."""

    latent_dim: int
    grid: tuple[int, int]
    text_dim: int
    width: int = 1024
    depth: int = 16
    num_heads: int = 16
    patch_size: int = 1
    mlp_ratio: float = 4.0
    rope: bool = False
    """Rotary positions of the latent's tokens beside the fixed ones. Not in the paper."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of both streams. Not in the paper."""
    checkpoint_activations: bool = False

    @classmethod
    def preset(
        cls, size: str, latent_dim: int, grid: tuple[int, int], text_dim: int, **changes: object
    ) -> MMDiTConfig:
        """The MMDiT of size S, B, L or XL. Raises ValueError for another."""
        if size not in SIZES:
            raise ValueError(f"No MMDiT size {size!r}; there are {', '.join(SIZES)}.")
        width, depth = SIZES[size]
        shape = {"width": width, "depth": depth, "num_heads": width // HEAD_DIM}
        return cls(latent_dim, grid, text_dim, **{**shape, **changes})  # type: ignore[arg-type]


class Stream(nn.Module):
    """What one stream has of a block: adaLN, attention's projections, MLP.

    A stream that ends with the block gives the other its keys and values. Its queries are not used.
    """

    def __init__(self, config: MMDiTConfig, ends: bool) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.num_heads
        self.num_heads = config.num_heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, (2 if ends else 6) * width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        queries = config.qk_norm and not ends
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if queries else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        if not ends:
            self.output = nn.Linear(width, width, bias=False)
            self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.mlp = SwiGLU(width, config.mlp_ratio, bias=False, multiple_of=HIDDEN_MULTIPLE)

    def project(self, x: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, N, head_dim] of tokens [B, N, D].

        `values` are adaLN's [B, D]; the first two are shift and scale.
        """
        h = modulate(self.norm_attention(x), values[0], values[1])
        q, k, v = split_heads(self.qkv(h), self.num_heads)
        return self.norm_q(q), self.norm_k(k), v

    def update(self, x: Tensor, attended: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        """Tokens [B, N, D] after attention's result [B, N, D] and the MLP; `values` are adaLN's."""
        _, _, gate_attention, shift_mlp, scale_mlp, gate_mlp = values
        x = x + gate_attention[:, None] * self.output(attended)
        h = modulate(self.norm_mlp(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.mlp(h)


class MMDiTBlock(nn.Module):
    """One attention over the tokens of both streams. The last block returns its text unchanged."""

    def __init__(self, config: MMDiTConfig, last: bool) -> None:
        super().__init__()
        self.rope = config.rope
        self.last = last
        self.latent = Stream(config, ends=False)
        self.text = Stream(config, ends=last)

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor, condition: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latent tokens [B, N, D] and text tokens [B, L, D] after the block.

        `mask` bool [B, 1, 1, L+N] is true for the tokens, text first, that may be attended to.
        """
        activated = F.silu(condition)
        of_latent = self.latent.modulation(activated).chunk(6, dim=-1)
        of_text = self.text.modulation(activated).chunk(2 if self.last else 6, dim=-1)
        q, k, v = self.latent.project(x, of_latent)
        if self.rope:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        text_q, text_k, text_v = self.text.project(text, of_text)
        keys, values = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        queries = q if self.last else torch.cat([text_q, q], dim=2)
        attended = attention(queries, keys, values, mask)
        attended = attended.transpose(1, 2).flatten(2)
        if self.last:
            return self.latent.update(x, attended, of_latent), text
        of_words, of_cells = attended.split([text.shape[1], x.shape[1]], dim=1)
        return (
            self.latent.update(x, of_cells, of_latent),
            self.text.update(text, of_words, of_text),
        )


class MMDiT(LatentModel):
    """velocity = model(latents, t, states, mask), with the token states of a frozen encoder.

    The condition of the blocks is the time alone: the text acts through attention. The states of
    the empty caption take the place of the null class.
    """

    position: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config.latent_dim)
        self.config = config
        patch, width = config.patch_size, config.width
        if width % config.num_heads:
            raise ValueError(f"Width {width} is not divisible by {config.num_heads} heads.")
        if config.grid[0] % patch or config.grid[1] % patch:
            raise ValueError(
                f"The latent's grid {config.grid} does not divide into patches of {patch}."
            )
        self.tokens = (config.grid[0] // patch, config.grid[1] // patch)
        token_dim = config.latent_dim * patch * patch
        self.input = nn.Linear(token_dim, width)
        self.text_input = nn.Linear(config.text_dim, width)
        self.time = TimestepEmbedding(width)
        self.blocks = nn.ModuleList(
            MMDiTBlock(config, last=index == config.depth - 1) for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, token_dim)
        position = sincos_position_table(width, self.tokens)
        cos, sin = rope_table(width // config.num_heads, self.tokens)
        for name, table in (("position", position), ("rope_cos", cos), ("rope_sin", sin)):
            self.register_buffer(name, table, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """As DiT: Xavier for linear layers, 0.02 for the time's, 0 for adaLN and the output."""
        self.apply(init_linear)
        for layer in self.time.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for name, module in self.named_modules():
            if name.endswith("modulation") and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.output.weight)

    def forward(self, latents: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Velocity [B, C, H, W] of latents [B, C, H, W] at times t [B] in [0, 1]; 1 is noise.

        `states` [B, L, text_dim] are token states, of which `mask` bool [B, L] says what is text.
        The others change nothing, and there may be no text at all.
        """
        x = self.input(patchify(latents, self.config.patch_size)) + self.position
        text = self.text_input(states.to(x.dtype))
        cells = mask.new_ones(len(x), x.shape[1])
        attended_to = torch.cat([mask, cells], dim=1)[:, None, None]
        condition = self.time(t)
        for block in self.blocks:
            arguments = (x, text, attended_to, condition, self.rope_cos, self.rope_sin)
            if self.config.checkpoint_activations and self.training:
                x, text = recompute(block, *arguments, use_reentrant=False)
            else:
                x, text = block(*arguments)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        tokens = self.output(modulate(self.norm(x), shift, scale))
        return unpatchify(tokens, self.config.patch_size, self.tokens)
