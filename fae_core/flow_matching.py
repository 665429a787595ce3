"""Flow matching on the linear path: t = 0 is data, t = 1 is noise, and the network predicts the velocity between them.

x_t = (1-t)·x + t·noise and v = noise - x (arXiv 2512.07829, appendix D; SiT, arXiv 2401.08740). The timestep shift
moves times towards the noise; `shift` here is alpha of RAE (arXiv 2510.11690) and SD3, the reciprocal of LightningDiT's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PAPER_SHIFT = 1.0 / 0.4
"""The paper's 0.4 follows LightningDiT's code, in which t = 1 is data; in this orientation it is 2.5."""

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """alpha·t / (1 + (alpha-1)·t): for alpha above 1 times move towards 1, the noise; 0 and 1 stay."""
    if shift <= 0:
        raise ValueError(f"A timestep shift is above 0, not {shift}.")
    return shift * t / (1.0 + (shift - 1.0) * t)


def timesteps(draws: Tensor, distribution: str = "uniform", shift: float = 1.0) -> Tensor:
    """Training times [B] of standard normal `draws` [B]: uniform, or `lognormal` (the logistic function of a normal).

    The paper leaves the distribution to "the original works": SiT's is uniform, LightningDiT's is lognormal.
    """
    if distribution == "uniform":
        t = 0.5 * (1.0 + torch.erf(draws / 2.0**0.5))
    elif distribution == "lognormal":
        t = torch.sigmoid(draws)
    else:
        raise ValueError(f"Distribution {distribution!r} is neither uniform nor lognormal.")
    return shift_timesteps(t, shift)


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of latents and noise [B, ...] at times t [B]."""
    t = t.view(-1, *[1] * (latents.ndim - 1))
    return (1.0 - t) * latents + t * noise


def flow_matching_loss(
    model: Velocity,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Tensor,
    cosine_weight: float = 0.0,
) -> dict[str, Tensor]:
    """0-dim float32 `loss`, `velocity_mse` (mean over everything) and `velocity_cosine` (over channels).

    The squared error is not weighted by time: the paper's "w_t = sigma_t" stands among its sampler's rows and is taken
    for the diffusion coefficient. `cosine_weight` adds weight·(1 - cosine), LightningDiT's extra term (its default 1).
    """
    target = noise - latents
    output = model(interpolate(latents, noise, t), t, labels).float()
    mse = F.mse_loss(output, target)
    cosine = F.cosine_similarity(output, target, dim=1).mean()
    loss = mse + cosine_weight * (1.0 - cosine)
    return {"loss": loss, "velocity_mse": mse, "velocity_cosine": cosine}
