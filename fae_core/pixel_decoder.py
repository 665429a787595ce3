"""The pixel decoder: a plain ViT from patch features to an image.

It follows arXiv 2512.07829, section 4.2 and appendix D. It is trained on the backbone's own
features with Gaussian noise, then finetuned on the features that FAE's decoder reconstructs, so one
decoder serves every FAE of the same backbone. RAE's decoders (arXiv 2510.11690) decode noisy
features too; they are the same ViT with a class token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from fae_core.layers import init_linear, sincos_position_table

FEWEST_CHANNELS = 16
"""Of the maps of the head `convolution`, whose channels halve where their side doubles."""
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, depth and number of heads; L is the paper's size."""

RAE_SIZES = {
    "RAE-B": (768, 12, 12, 3072),
    "RAE-L": (1024, 24, 16, 4096),
    "RAE-XL": (1152, 28, 16, 4096),
}
"""Width, depth, number of heads and width of the MLP of RAE's decoders, which have a class token
and an epsilon of 1e-12 in their norms."""


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Shape of a PixelDecoder. `grid` is the features'; `image_size` [px] is a multiple of it."""

    feature_dim: int
    grid: tuple[int, int]
    image_size: int
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    head: Literal["linear", "convolution"] = "linear"
    mlp_width: int | None = None
    """Hidden channels of the MLP; four times the width without a value."""
    class_token: bool = False
    """Whether a learned token that becomes no pixels stands before those of the features."""
    norm_eps: float = 1e-6

    @classmethod
    def preset(
        cls, size: str, feature_dim: int, grid: tuple[int, int], image_size: int
    ) -> PixelDecoderConfig:
        """The decoder of a size in SIZES or RAE_SIZES. Raises ValueError for another."""
        if size in RAE_SIZES:
            width, depth, num_heads, mlp_width = RAE_SIZES[size]
            return cls(
                feature_dim, grid, image_size, width, depth, num_heads,
                mlp_width=mlp_width, class_token=True, norm_eps=1e-12,
            )  # fmt: skip
        if size not in SIZES:
            known = ", ".join([*SIZES, *RAE_SIZES])
            raise ValueError(f"No pixel decoder size {size!r}; there are {known}.")
        return cls(feature_dim, grid, image_size, *SIZES[size])


class Upsampling(nn.Module):
    """Maps [B, num_outputs, 2H, 2W] of maps [B, num_inputs, H, W].

    A projection whose channels become the four pixels of each cell, then two 3 x 3 convolutions
    beside a skip branch.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(num_inputs, 4 * num_outputs, 1)
        self.first = nn.Conv2d(num_outputs, num_outputs, 3, padding=1)
        self.second = nn.Conv2d(num_outputs, num_outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.projection(x), 2)
        return x + self.second(F.silu(self.first(F.silu(x))))


class PixelDecoder(nn.Module):
    """Images [B, 3, S, S] in [0, 1], not clamped, of raw backbone features [B, N, D].

    The head `linear` is the paper's: each token gives its own patch of pixels. `convolution`, not
    in the paper, doubles the side of the grid until it is the image's; neighbouring patches share
    what they draw, so small decoders leave no blocks.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        if rows != columns or config.image_size % rows:
            raise ValueError(
                "A pixel decoder needs a square grid that divides the image: "
                f"{config.grid} for {config.image_size} px."
            )
        if config.width % config.num_heads:
            raise ValueError(f"Width {config.width} is not divisible by {config.num_heads} heads.")
        self.patch = config.image_size // rows
        self.input = nn.Linear(config.feature_dim, config.width)
        self.position = nn.Parameter(
            sincos_position_table(config.width, config.grid), requires_grad=False
        )
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # timm's Block rounds down; the half keeps that at the width that is meant.
        mlp_ratio = 4.0 if config.mlp_width is None else (config.mlp_width + 0.5) / config.width
        norm: Any = partial(LayerNorm, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.output: nn.Linear | nn.Conv2d
        if config.head == "linear":
            self.output = nn.Linear(config.width, 3 * self.patch**2)
        else:
            num_stages = self.patch.bit_length() - 1
            if self.patch != 2**num_stages:
                raise ValueError(
                    f"The head convolution needs patches of a power of two, not {self.patch} px."
                )
            widths = [max(FEWEST_CHANNELS, config.width >> i) for i in range(num_stages + 1)]
            self.stages = nn.ModuleList(Upsampling(a, b) for a, b in itertools.pairwise(widths))
            self.output = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.apply(init_linear)
        self.register_buffer("feature_mean", torch.zeros(config.feature_dim))
        self.register_buffer("feature_std", torch.ones(config.feature_dim))

    def set_feature_stats(self, mean: Tensor, std: Tensor) -> None:
        """Fix the per-channel mean and standard deviation [D] of the features."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def forward(self, features: Tensor) -> Tensor:
        """Images float32 [B, 3, S, S] of features [B, N, D]."""
        x = (features.float() - self.feature_mean) / self.feature_std
        x = self.input(x) + self.position
        if self.config.class_token:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, -self.position.shape[0] :])  # without the class token
        if self.config.head == "convolution":
            maps = x.transpose(1, 2).unflatten(2, self.config.grid)
            for stage in self.stages:
                maps = stage(maps)
            return self.output(maps).float() + 0.5
        pixels = self.output(x).float()
        pieces = pixels.unflatten(2, (3, self.patch, self.patch)).unflatten(1, self.config.grid)
        image = pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return image + 0.5  # training starts from grey images


def to_uint8(images: Tensor) -> Tensor:
    """uint8 crops [B, S, S, 3] of images [B, 3, S, S]: values are clamped to [0, 1] and rounded."""
    return (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def from_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, S, S] float32 in [0, 1] of uint8 crops [B, S, S, 3]."""
    return images.permute(0, 3, 1, 2).float() / 255.0
