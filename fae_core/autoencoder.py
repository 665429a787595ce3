"""The Feature Auto-Encoder of arXiv 2512.07829: patch features -> Gaussian latent -> features.

One self-attention layer with wide heads and a linear projection encode (section 4.1, appendix A);
six transformer blocks decode (section 4.2). Details that the paper leaves open are chosen so that
the parameter counts equal the paper's; a choice that the counts do not decide is marked "not in the
paper".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fae_core.attention import attention
from fae_core.layers import (
    Block,
    RMSNorm,
    init_linear,
    rope_table,
    sincos_position_table,
    split_heads,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a FeatureAutoencoder. `feature_dim` and `grid` are those of the backbone."""

    feature_dim: int
    latent_dim: int
    grid: tuple[int, int]
    encoder_kind: Literal["attention", "linear", "transformer"] = "attention"
    encoder_num_heads: int = 24
    encoder_head_dim: int = 256
    encoder_depth: int = 1
    activation: Literal["gelu", "silu", "relu", "identity"] = "gelu"
    """Applied to the sum of attention and skip branch; not in the paper."""
    pre_norm: bool = False
    """Whether an RMSNorm precedes the attention; not in the paper."""
    decoder_depth: int = 6
    decoder_num_heads: int = 24
    kl_weight: float = 1e-6
    """β of eq. 4.1; its value is not in the paper. 1e-6 is that of ml-starflow and 1d-tokenizer,
    which reduce the loss's terms in the same way."""


class Posterior:
    """Diagonal Gaussian over latents: `mean`, and `logvar` clamped to [-30, 20], both [B, N, C]."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, noise: Tensor) -> Tensor:
        """Latents [B, N, C] for standard normal `noise` of that shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """The most likely latents [B, N, C]: the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the standard normal in nats, per element [B, N, C], float32.

        The divergence of an image is its sum over tokens and channels.
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


class FeatureEncoder(nn.Module):
    """Posterior over latents [B, N, latent_dim] of standardized features [B, N, feature_dim].

    `kind` is one of

    - `attention` (figure 7): softmax attention with `num_heads` heads of width `head_dim` and no
      output projection of its own. The heads, concatenated to num_heads*head_dim channels, are
      added to a linear skip branch of that width; activation and projection follow.
    - `linear`: the projection alone.
    - `transformer`: `depth` ordinary blocks, then the projection.

    Raises ValueError for another kind.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        num_heads: int = 24,
        head_dim: int = 256,
        kind: str = "attention",
        depth: int = 1,
        activation: str = "gelu",
        pre_norm: bool = False,
        grid: tuple[int, int] = (16, 16),
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_heads = num_heads
        self.activation = ACTIVATIONS[activation]
        self.norm = RMSNorm(feature_dim, eps=1e-6) if pre_norm else nn.Identity()
        width = feature_dim
        if kind == "attention":
            width = num_heads * head_dim
            self.qkv = nn.Linear(feature_dim, 3 * width)
            self.skip = nn.Linear(feature_dim, width)
        elif kind == "transformer":
            self.blocks = nn.ModuleList(Block(feature_dim, num_heads) for _ in range(depth))
            cos, sin = rope_table(feature_dim // num_heads, grid)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        elif kind != "linear":
            raise ValueError(f"Encoder kind {kind!r} is none of attention, linear, transformer.")
        self.projection = nn.Linear(width, 2 * latent_dim)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Posterior:
        x = self.norm(features)
        if self.kind == "attention":
            q, k, v = split_heads(self.qkv(x), self.num_heads)
            attended = attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.activation(attended + self.skip(x))
        elif self.kind == "transformer":
            for block in self.blocks:
                x = block(x, self.rope_cos, self.rope_sin)
        mean, logvar = self.projection(x).float().chunk(2, dim=-1)
        return Posterior(mean, logvar)


class FeatureDecoder(nn.Module):
    """Standardized features [B, N, feature_dim] of latents [B, N, latent_dim]; N = H*W of `grid`.

    The blocks are as wide as the backbone's features, so their output needs no projection. Beside
    the rotary positions there is a frozen sine-cosine table, which is a parameter as in
    LightningDiT: the paper's count of 170.43 M includes it.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        depth: int = 6,
        num_heads: int = 24,
        grid: tuple[int, int] = (16, 16),
    ) -> None:
        super().__init__()
        self.input = nn.Linear(latent_dim, feature_dim)
        self.position = nn.Parameter(sincos_position_table(feature_dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(feature_dim, num_heads) for _ in range(depth))
        cos, sin = rope_table(feature_dim // num_heads, grid)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(init_linear)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.input(latents) + self.position
        for block in self.blocks:
            x = block(x, self.rope_cos, self.rope_sin)
        return x


class FeatureAutoencoder(nn.Module):
    """Encoder, decoder, and the per-channel statistics that standardize the backbone's features."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FeatureEncoder(
            config.feature_dim,
            config.latent_dim,
            config.encoder_num_heads,
            config.encoder_head_dim,
            config.encoder_kind,
            config.encoder_depth,
            config.activation,
            config.pre_norm,
            config.grid,
        )
        self.decoder = FeatureDecoder(
            config.feature_dim,
            config.latent_dim,
            config.decoder_depth,
            config.decoder_num_heads,
            config.grid,
        )
        self.register_buffer("feature_mean", torch.zeros(config.feature_dim))
        self.register_buffer("feature_std", torch.ones(config.feature_dim))

    def set_feature_stats(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel mean and standard deviation [D] of the backbone's features.

        Raises ValueError where a value is not finite or a standard deviation is not above 0.
        """
        if not bool(torch.isfinite(std).all() and (std > 0).all() and torch.isfinite(mean).all()):
            raise ValueError(
                "Feature statistics must be finite, with every standard deviation above 0."
            )
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def standardize(self, features: Tensor) -> Tensor:
        """Features [B, N, D] with zero mean and unit variance per channel, float32."""
        return (features.float() - self.feature_mean) / self.feature_std

    def encode(self, features: Tensor) -> Posterior:
        """Posterior over latents [B, N, C] of raw backbone features [B, N, D]."""
        return self.encoder(self.standardize(features))

    def decode_standardized(self, latents: Tensor) -> Tensor:
        """Standardized features [B, N, D] of latents [B, N, C]."""
        return self.decoder(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw backbone features [B, N, D], float32, of latents [B, N, C]."""
        return self.decoder(latents).float() * self.feature_std + self.feature_mean

    def forward(self, features: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The terms of `autoencoder_loss`; as `forward` it works in a data-parallel wrapper."""
        return autoencoder_loss(self, features, noise)


def autoencoder_loss(
    model: FeatureAutoencoder, features: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Eq. 4.1: squared error + β·KL, as 0-dim float32 tensors `loss`, `mse`, `kl`, `cosine`.

    `features` [B, N, D] are raw, `noise` [B, N, C] is standard normal. `mse` is the mean over
    images, tokens and channels of standardized features; `kl` is summed over tokens and channels
    and averaged over images. These reductions are not in the paper; they are those of ml-starflow.
    `cosine` is the mean cosine similarity of raw features over images and tokens.
    """
    target = model.standardize(features)
    posterior = model.encoder(target)
    output = model.decode_standardized(posterior.sample(noise)).float()
    mse = F.mse_loss(output, target)
    kl = posterior.kl().sum(dim=(1, 2)).mean()
    with torch.no_grad():
        raw = output * model.feature_std + model.feature_mean
        cosine = F.cosine_similarity(raw, features.float(), dim=-1).mean()
    return {"loss": mse + model.config.kl_weight * kl, "mse": mse, "kl": kl, "cosine": cosine}
