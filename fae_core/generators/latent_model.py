"""The base of both generators: the statistics that normalize latents, stored in the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LatentModel(nn.Module):
    """A network on latents of zero mean and unit variance per channel, with the map to raw ones."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))

    def set_latent_stats(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel mean and standard deviation [C] of the raw latents.

        Raises ValueError where a value is not finite or a standard deviation is not above 0.
        """
        if not bool(torch.isfinite(std).all() and (std > 0).all() and torch.isfinite(mean).all()):
            raise ValueError(
                "Latent statistics must be finite, with every standard deviation above 0."
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalize(self, latents: Tensor) -> Tensor:
        """Normalized latents [B, C, H, W] float32 of raw latents of that shape."""
        return (latents.float() - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, latents: Tensor) -> Tensor:
        """Raw latents [B, C, H, W] float32 of normalized latents of that shape."""
        return latents.float() * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
