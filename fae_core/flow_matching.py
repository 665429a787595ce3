"""Flow matching on the linear path: t = 0 is data, t = 1 is noise, the network predicts velocities.

x_t = (1-t)·x + t·noise and v = noise - x (arXiv 2512.07829, appendix D; SiT, arXiv 2401.08740). The
timestep shift moves times towards the noise. `shift` is the alpha of RAE (arXiv 2510.11690) and
SD3, which is the reciprocal of LightningDiT's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PAPER_SHIFT = 1.0 / 0.4
"""The paper's 0.4 follows LightningDiT's code, in which t = 1 is data; where t = 1 is noise, the
same shift is 2.5."""

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """alpha·t / (1 + (alpha-1)·t) for alpha = `shift`: above 1 it moves times towards 1, the noise.

    0 and 1 stay. Raises ValueError for a shift that is not above 0.
    """
    if shift <= 0:
        raise ValueError(f"A timestep shift is above 0, not {shift}.")
    return shift * t / (1.0 + (shift - 1.0) * t)


def timesteps(draws: Tensor, distribution: str = "uniform", shift: float = 1.0) -> Tensor:
    """Training times [B] in [0, 1] of standard normal `draws` [B], then shifted.

    `distribution` is `uniform`, or `lognormal` for the logistic function of the draws. The paper
    refers to "the original works": SiT's is uniform, LightningDiT's is lognormal. Raises ValueError
    for another.
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
    """0-dim float32 `loss`, `velocity_mse` (mean over all elements) and `velocity_cosine`.

    The cosine is taken over channels. The squared error is not weighted by time: the paper lists
    "w_t = sigma_t" among the sampler's settings, so it is taken for the diffusion coefficient.
    `cosine_weight` adds weight·(1 - cosine), an extra term of LightningDiT (where the weight is 1).
    """
    target = noise - latents
    output = model(interpolate(latents, noise, t), t, labels).float()
    mse = F.mse_loss(output, target)
    cosine = F.cosine_similarity(output, target, dim=1).mean()
    loss = mse + cosine_weight * (1.0 - cosine)
    return {"loss": loss, "velocity_mse": mse, "velocity_cosine": cosine}
