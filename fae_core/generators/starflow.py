"""STARFlow: a normalizing flow of causal transformers on latents (arXiv 2506.06276).

It builds on TARFlow (arXiv 2412.06329). Each block maps tokens x to z_i = (x_i - mu_i(x_<i)) /
sigma_i(x_<i), and consecutive blocks read the tokens in opposite directions. The last block, next
to the noise, is deep and is the only one that sees the class; the others are shallow. The
likelihood is exact. Sampling inverts block by block and token by token, with cached keys and
values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from fae_core.attention import attention
from fae_core.generators.latent_model import LatentModel
from fae_core.layers import RMSNorm, apply_rope, init_linear, rope_table, split_heads

HEAD_DIM = 64
SOFTPLUS_ONE = math.log(math.e - 1.0)
"""softplus of this is 1, so a raw output of 0 gives sigma = 1."""
LATENT_PENALTY = 1e-4
"""Weight of the mean square of every block's output except the last (STARFlow, appendix B.2)."""

SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "S": (384, (2, 2, 8)),
    "B": (512, (2, 2, 2, 12)),
    "M": (768, (2, 2, 2, 12)),
    "L": (1024, (2, 2, 2, 16)),
    "XL": (2048, (2, 2, 2, 2, 2, 18)),
}
"""Width, and layers of each block from the data to the noise. XL is the paper's for ImageNet, with
1.41 B parameters; the smaller sizes are not in the paper."""


@dataclass(frozen=True)
class StarFlowConfig:
    """Shape of a StarFlow. `grid` is the latent's height and width; every position is a token."""

    latent_dim: int
    grid: tuple[int, int]
    width: int = 2048
    layers: tuple[int, ...] = (2, 2, 2, 2, 2, 18)
    """Layers of each block from the data to the noise; the last is the deep, conditional block."""
    num_classes: int = 1000
    label_dropout: float = 0.1
    """Share of training labels replaced by the null class; the paper gives this for text only."""
    noise_std: float = 0.3
    """Standard deviation of the noise on training latents, in their own units. 0.3 is the paper's
    value for SD-VAE; there is none for FAE."""
    soft_clip: float = 4.0
    """Raw outputs r are replaced by a·tanh(r/a) for this a."""
    checkpoint_activations: bool = False

    @classmethod
    def preset(
        cls, size: str, latent_dim: int, grid: tuple[int, int], **changes: object
    ) -> StarFlowConfig:
        """The flow of size S, B, M, L or XL. Raises ValueError for another."""
        if size not in SIZES:
            raise ValueError(f"No STARFlow size {size!r}; there are {', '.join(SIZES)}.")
        width, layers = SIZES[size]
        return cls(latent_dim, grid, **{"width": width, "layers": layers, **changes})  # type: ignore[arg-type]


class KeyValueCache:
    """Keys and values [B, heads, positions, HEAD_DIM] of a layer, in memory allocated once."""

    def __init__(self, batch: int, places: int, width: int, like: Tensor) -> None:
        self.buffers = like.new_empty(2, batch, width // HEAD_DIM, places, HEAD_DIM)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, heads, n, HEAD_DIM]; returns all keys and values so far."""
        first, self.length = self.length, self.length + k.shape[2]
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer[:, :, first : self.length] = new
        keys, values = self.buffers[:, :, :, : self.length]
        return keys, values


class CausalLayer(nn.Module):
    """Pre-LayerNorm causal transformer layer; with a cache its input is the new positions only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD_DIM
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        q, k, v = split_heads(self.qkv(self.norm_attention(x)), self.num_heads)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        causal = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.extend(k, v)
        attended = attention(q, k, v, causal=causal)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class FlowBlock(nn.Module):
    """One autoregressive affine map of tokens [B, N, C] in the given order; the caller flips them.

    The network's input is [class prefix,] start token, x_1 .. x_{N-1}. Its output at each of these
    gives mu and sigma of the next token, and the input carries the position of that next token.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: StarFlowConfig, depth: int, conditional: bool) -> None:
        super().__init__()
        width, channels = config.width, config.latent_dim
        if width % HEAD_DIM:
            raise ValueError(f"STARFlow's width {width} is not a multiple of {HEAD_DIM}.")
        self.soft_clip = config.soft_clip
        self.checkpoint_activations = config.checkpoint_activations
        self.start = nn.Parameter(torch.randn(1, 1, channels))
        self.input = nn.Linear(channels, width)
        self.prefix = nn.Linear(config.num_classes + 1, width) if conditional else None
        self.layers = nn.ModuleList(CausalLayer(width) for _ in range(depth))
        self.norm = RMSNorm(width, eps=1e-6)
        self.output = nn.Linear(width, 2 * channels)
        cos, sin = rope_table(HEAD_DIM, config.grid)
        if conditional:  # the class shares the first position
            cos, sin = torch.cat([cos[:1], cos]), torch.cat([sin[:1], sin])
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(init_linear)
        # The released code leaves this bias random; at zero the block starts as the identity
        # exactly.
        nn.init.zeros_(self.output.weight)

    def embed(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """Network inputs [B, 1 + n, width]: the start token, then `tokens` [B, n, C].

        A conditional block puts the class prefix of `labels` [B] before them: [B, 2 + n, width].
        """
        start = self.start.expand(len(tokens), -1, -1)
        x = self.input(torch.cat([start, tokens], dim=1))
        if self.prefix is None:
            return x
        assert labels is not None
        one_hot = F.one_hot(labels, self.prefix.in_features).to(x.dtype)
        return torch.cat([self.prefix(one_hot)[:, None], x], dim=1)

    def run(self, x: Tensor, place: int, caches: Sequence[KeyValueCache] | None) -> Tensor:
        """Hidden states [B, n, width] of inputs x of that shape; `place` is the first position."""
        cos, sin = (
            self.rope_cos[place : place + x.shape[1]],
            self.rope_sin[place : place + x.shape[1]],
        )
        for index, layer in enumerate(self.layers):
            if self.checkpoint_activations and self.training:
                x = recompute(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, None if caches is None else caches[index])
        return self.norm(x)

    def affine(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """mu and sigma [B, n, C], float32, of hidden states [B, n, width]."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden.float(), self.output.weight.float(), self.output.bias.float())
            raw = self.soft_clip * torch.tanh(raw / self.soft_clip)
            mean, scale = raw.chunk(2, dim=-1)
            return mean, F.softplus(scale + SOFTPLUS_ONE)

    def forward(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(z, log sigma), each float32 [B, N, C]."""
        hidden = self.run(self.embed(x[:, :-1], labels), 0, None)
        mean, std = self.affine(hidden[:, -x.shape[1] :])
        return (x.float() - mean) / std, std.log()

    def inverse(
        self, z: Tensor, labels: Tensor | None, null: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """Tokens x [B, N, C] float32 of z [B, N, C], computed one after the other.

        With `null` labels [B] they are guided by `guidance`, the paper's omega; 0 is no guidance.
        """
        guided = null is not None and guidance != 0.0
        if guided:
            assert labels is not None and null is not None
            labels = torch.cat([labels, null])
        batch = 2 * len(z) if guided else len(z)
        places, width = len(self.rope_cos), self.output.in_features
        caches = [KeyValueCache(batch, places, width, z) for _ in self.layers]
        entering = self.embed(z.new_zeros(batch, 0, z.shape[2]), labels)
        place = 0
        tokens: list[Tensor] = []
        for index in range(z.shape[1]):
            hidden = self.run(entering, place, caches)
            place += entering.shape[1]
            mean, std = self.affine(hidden[:, -1:])
            if guided:
                (mean, null_mean), (std, null_std) = mean.chunk(2), std.chunk(2)
                mean, std = guide(mean, null_mean, std, null_std, guidance)
            token = mean + std * z[:, index : index + 1].float()
            tokens.append(token)
            entering = self.input(torch.cat([token, token]) if guided else token)
        return torch.cat(tokens, dim=1)


def guide(
    mean: Tensor, null_mean: Tensor, std: Tensor, null_std: Tensor, omega: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation under STARFlow's guidance (eq. 9).

    They are those of the Gaussian whose score is extrapolated from the null class's; the ratio of
    the variances is clipped to 1.
    """
    ratio = (std / null_std).square().clamp(0.0, 1.0)
    divisor = 1.0 + omega - omega * ratio
    return mean + omega * ratio / divisor * (mean - null_mean), std / divisor.sqrt()


class StarFlow(LatentModel):
    """Exact log-likelihood of latents [B, C, H, W] and, by inversion, samples of them."""

    def __init__(self, config: StarFlowConfig) -> None:
        super().__init__(config.latent_dim)
        self.config = config
        last = len(config.layers) - 1
        self.blocks = nn.ModuleList(
            FlowBlock(config, depth, conditional=index == last)
            for index, depth in enumerate(config.layers)
        )

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.config.num_classes

    def forward(self, latents: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Tokens `z` [B, N, C] on the noise's side, `log_det` [B] of dz/dx, and `penalty`, 0-dim.

        The penalty is the sum of the mean squares of the tokens between blocks.
        """
        x = latents.flatten(2).transpose(1, 2)
        log_det = x.new_zeros(len(x), dtype=torch.float32)
        penalty = x.new_zeros((), dtype=torch.float32)
        for index, block in enumerate(self.blocks):
            if index:
                penalty = penalty + x.float().square().mean()
            flipped = index % 2 == 1
            z, log_std = block(x.flip(1) if flipped else x, labels if block.prefix else None)
            x = z.flip(1) if flipped else z
            log_det = log_det - log_std.sum(dim=(1, 2))
        return {"z": x, "log_det": log_det, "penalty": penalty}

    def log_likelihood(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Natural logarithm of the density [B] of latents [B, C, H, W]."""
        output = self(latents, labels)
        return _log_density(output)

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor, guidance: float = 0.0) -> Tensor:
        """Latents [B, C, H, W] float32 of standard normal noise of that shape.

        `guidance`, the paper's omega, acts in the deep block only. Autocast is off, because in
        bfloat16 the result would not be the inverse.
        """
        height, width = noise.shape[2:]
        null = torch.full_like(labels, self.null_class)
        with torch.autocast(noise.device.type, enabled=False):
            x = noise.float().flatten(2).transpose(1, 2)
            for index in reversed(range(len(self.blocks))):
                block = self.blocks[index]
                assert isinstance(block, FlowBlock)
                z = x.flip(1) if index % 2 else x
                tokens = (
                    block.inverse(z, labels, null, guidance)
                    if block.prefix
                    else block.inverse(z, None)
                )
                x = tokens.flip(1) if index % 2 else tokens
        return x.transpose(1, 2).unflatten(2, (height, width))

    def denoise(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Tweedie's estimate x + noise_std²·grad log p(x), [B, C, H, W], of noiseless latents."""
        with torch.enable_grad(), torch.autocast(latents.device.type, enabled=False):
            x = latents.detach().float().requires_grad_(True)
            (score,) = torch.autograd.grad(self.log_likelihood(x, labels).sum(), x)
        return (latents + self.config.noise_std**2 * score).detach()


def _log_density(output: dict[str, Tensor]) -> Tensor:
    z = output["z"]
    normal = -0.5 * (z.square() + math.log(2.0 * math.pi)).sum(dim=(1, 2))
    return normal + output["log_det"]


def flow_loss(
    model: nn.Module, latents: Tensor, noise: Tensor, labels: Tensor, noise_std: float
) -> dict[str, Tensor]:
    """0-dim `loss` and `bits_per_dim` of latents [B, C, H, W] plus noise_std·noise.

    The loss is in nats per dimension, without the constant ½ln 2π, plus the weighted penalty. Bits
    per dimension are those of a density, so they may be negative. With fresh noise the expected
    negative log-likelihood is at least the entropy of the noise, ½ln(2πe) + ln(noise_std) nats per
    dimension.
    """
    output = model(latents + noise_std * noise, labels)
    nll = -_log_density(output).mean() / output["z"][0].numel()
    loss = nll - 0.5 * math.log(2.0 * math.pi) + LATENT_PENALTY * output["penalty"]
    return {"loss": loss, "bits_per_dim": (nll / math.log(2.0)).detach()}
