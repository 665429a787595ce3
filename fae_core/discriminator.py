"""The pixel decoder's discriminators: one on pixels, one on the features of a frozen backbone.

The first is a PatchGAN with blurred downsampling, as in TA-TiTok and ml-starflow; the second
follows the projected discriminators of StyleGAN-T and RAE. Both return logits for many positions of
an image, over which the hinge loss averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from fae_core.backbone import Backbone


class BlurDownsample(nn.Module):
    """Halves height and width after a binomial filter [1, 3, 3, 1], which prevents aliasing."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = row[:, None] * row
        self.register_buffer(
            "kernel", (kernel / kernel.sum()).expand(channels, 1, 4, 4).clone(), False
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.kernel.to(x.dtype), stride=2, groups=len(self.kernel))


class PatchDiscriminator(nn.Module):
    """Logits [B, positions] of images [B, 3, S, S] in [0, 1]; `widths` are the stages' channels."""

    def __init__(self, widths: Sequence[int] = (128, 256, 512), stem: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 5, padding=2), nn.LeakyReLU(0.1)]
        channels = stem
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                BlurDownsample(width),
                nn.GroupNorm(min(32, width // 4), width),
                nn.LeakyReLU(0.1),
            ]
            channels = width
        layers += [
            nn.AdaptiveMaxPool2d(16),
            nn.Conv2d(channels, channels, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, 1, 5, padding=2),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2.0 - 1.0).flatten(1)


class FeatureDiscriminator(nn.Module):
    """Logits [B, heads*N] from spectrally normalized heads on a frozen backbone's block outputs.

    There is one head for each of `blocks`. The module takes the tokens [B, N, D] of these blocks
    and does not hold the backbone, so checkpoints contain the heads alone.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], blocks: Sequence[int] = (2, 5, 8, 11)
    ) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.grid = grid
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(dim, dim // 2, 1)),
                nn.GroupNorm(1, dim // 2),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(dim // 2, dim // 2, 3, padding=1)),
                nn.GroupNorm(1, dim // 2),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(dim // 2, 1, 1)),
            )
            for _ in self.blocks
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        height, width = self.grid
        logits = [
            head(x.transpose(1, 2).unflatten(2, (height, width))).flatten(1)
            for head, x in zip(self.heads, features, strict=True)
        ]
        return torch.cat(logits, dim=1)


class LeCam(nn.Module):
    """LeCam regularization (arXiv 2104.03310) by running means of the logits, which start at 0."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty of a batch, 0-dim, by the running means of the steps before."""
        real, fake = real_logits.float().mean(), fake_logits.float().mean()
        return F.relu(real - self.fake).square() + F.relu(self.real - fake).square()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, share: Tensor) -> None:
        """Move the running means by a step's logits, all 0-dim.

        `real` and `fake` are sums over the images that a step has, `share` of those planned,
        divided by the number planned.
        """
        self.real.add_(real - share * self.real, alpha=1.0 - self.decay)
        self.fake.add_(fake - share * self.fake, alpha=1.0 - self.decay)


class Discriminator(nn.Module):
    """The discriminator of `kind` `patch` (pixels) or `backbone` (features), and LeCam's state.

    `forward(images, backbone)` returns logits [B, positions]; only the second kind uses the
    backbone. Raises ValueError for another kind.
    """

    def __init__(
        self,
        kind: str,
        dim: int = 0,
        grid: tuple[int, int] = (16, 16),
        blocks: Sequence[int] = (2, 5, 8, 11),
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "patch":
            self.judge: nn.Module = PatchDiscriminator()
        elif kind == "backbone":
            self.judge = FeatureDiscriminator(dim, grid, blocks)
        else:
            raise ValueError(f"Discriminator {kind!r} is neither patch nor backbone.")
        self.lecam = LeCam()

    def forward(self, images: Tensor, backbone: Backbone) -> Tensor:
        if self.kind == "patch":
            return self.judge(images)
        judge: Any = self.judge
        return judge(backbone.intermediate(images, judge.blocks))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss, 0-dim: half of mean relu(1 - real) + mean relu(1 + fake)."""
    real, fake = real_logits.float(), fake_logits.float()
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """DiffAugment (arXiv 2006.10738) of `images` [B, 3, S, S] by uniform `draws` [B, 5] in [0, 1].

    Images are in [0, 1]. The constants are for [-1, 1], as in RAE (arXiv 2510.11690): there,
    brightness changes by up to ±0.5, saturation by a factor in [0, 2], contrast by one in
    [0.5, 1.5]; then the image is shifted by up to an eighth of its size and padded with mid-grey.
    Differentiable in the images.
    """
    brightness, saturation, contrast = (draws[:, i].view(-1, 1, 1, 1) for i in range(3))
    x = images * 2.0 - 1.0 + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2.0 * saturation) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * (contrast + 0.5) + mean
    size, reach = images.shape[-1], images.shape[-1] // 8
    offsets = (draws[:, 3:] * (2 * reach + 1)).floor().clamp(max=2 * reach).long()
    padded = F.pad((x + 1.0) / 2.0, (reach, reach, reach, reach), value=0.5)
    along = torch.arange(size, device=images.device)
    rows = (offsets[:, 0, None] + along)[:, None, :, None]
    columns = (offsets[:, 1, None] + along)[:, None, None, :]
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channels = torch.arange(3, device=images.device).view(1, -1, 1, 1)
    return padded[batch, channels, rows, columns]
