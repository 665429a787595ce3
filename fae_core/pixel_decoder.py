"""The pixel decoder: a plain ViT from patch features to an image.

It follows arXiv 2512.07829, section 4.2 and appendix D. It is trained on the backbone's own
features with Gaussian noise, then finetuned on the features that FAE's decoder reconstructs, so one
decoder serves every FAE of the same backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fae_core.layers import init_linear, sincos_position_table

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, depth and number of heads; L is the paper's size."""


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Shape of a PixelDecoder. `grid` is the features'; `image_size` [px] is a multiple of it."""

    feature_dim: int
    grid: tuple[int, int]
    image_size: int
    width: int = 1024
    depth: int = 24
    num_heads: int = 16

    @classmethod
    def preset(
        cls, size: str, feature_dim: int, grid: tuple[int, int], image_size: int
    ) -> PixelDecoderConfig:
        """The decoder of size S, B or L. Raises ValueError for another."""
        if size not in SIZES:
            raise ValueError(f"No pixel decoder size {size!r}; there are {', '.join(SIZES)}.")
        return cls(feature_dim, grid, image_size, *SIZES[size])


class PixelDecoder(nn.Module):
    """Images [B, 3, S, S] in [0, 1], not clamped, of raw backbone features [B, N, D]."""

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
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, qkv_bias=True) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.output = nn.Linear(config.width, 3 * self.patch**2)
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
        for block in self.blocks:
            x = block(x)
        pixels = self.output(self.norm(x)).float()
        pieces = pixels.unflatten(2, (3, self.patch, self.patch)).unflatten(1, self.config.grid)
        image = pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return image + 0.5  # training starts from grey images


def to_uint8(images: Tensor) -> Tensor:
    """uint8 crops [B, S, S, 3] of images [B, 3, S, S]: values are clamped to [0, 1] and rounded."""
    return (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def from_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, S, S] float32 in [0, 1] of uint8 crops [B, S, S, 3]."""
    return images.permute(0, 3, 1, 2).float() / 255.0
