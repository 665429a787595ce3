"""From noise to latents: Euler or Heun for the probability-flow ODE, Euler-Maruyama for the SDE.

They integrate a velocity field from t = 1 (noise) to t = 0 (data) in SiT's formulation (arXiv
2401.08740), guided by the field without a class or by that of a weaker network. The paper uses the
SDE without guidance and the ODE with guidance, with 250 steps each (arXiv 2512.07829, appendix D).
The public code of SiT and LightningDiT differs from the papers in the SDE's diffusion, in its last
step and in the channels that are guided; these are arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fae_core.flow_matching import Velocity, shift_timesteps


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance of `scale` for times in (end, start].

    Scale 1 is no guidance; below 1 the velocity is drawn towards the unconditional field.
    """

    start: float
    end: float
    scale: float


PAPER_GUIDANCE = (GuidanceInterval(1.0, 0.9, 0.9), GuidanceInterval(0.7, 0.0, 2.5))
"""The guidance of the paper's main results. The paper divides time in three parts and does not say
that there is no guidance between 0.9 and 0.7: that is inferred. Whether its scales are for all
channels, or for the first three as in LightningDiT's code, is not in the paper."""

PAPER_TEXT_GUIDANCE = (GuidanceInterval(0.9, 0.0, 1.5),)
"""The guidance of the paper's text-to-image model (appendix D), for channels that it does not
name either."""


def guidance_scale(t: float, intervals: Sequence[GuidanceInterval]) -> float:
    """The scale at time t; 1 outside every interval."""
    return next((i.scale for i in intervals if i.end < t <= i.start), 1.0)


def timestep_grid(
    num_steps: int, shift: float = 1.0, last_step: float | None = None
) -> list[float]:
    """num_steps + 1 times from 1 to 0, evenly spaced before the shift.

    The last step is from `last_step` to 0, before the shift too, if it is given. Raises ValueError
    for less than one step, or less than two with a `last_step`.
    """
    if num_steps < (1 if last_step is None else 2):
        raise ValueError(
            f"{num_steps} steps are too few: at least one is needed, two with a last step."
        )
    if last_step is None:
        even = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    else:
        even = torch.linspace(1.0, last_step, num_steps, dtype=torch.float64)
        even = torch.cat([even, torch.zeros(1, dtype=torch.float64)])
    return [float(t) for t in shift_timesteps(even, shift)]


def guided_velocity(
    model: Velocity,
    x: Tensor,
    t: float,
    labels: Tensor,
    null_class: int,
    scale: float,
    channels: int | None = None,
    guide: Velocity | None = None,
) -> Tensor:
    """v_other + scale·(v - v_other), float32 like `x` [B, C, ...], for labels int64 [B].

    v_other is the model's own of `null_class` (classifier-free guidance), or that of `guide`, a
    weaker network, of the same labels (autoguidance, arXiv 2406.02507). With `channels` only so
    many first channels are guided; the others have v. At scale 1 the model runs on the batch once;
    without a guide otherwise on a doubled batch.
    """
    times = torch.full((len(x),), t, device=x.device)
    if scale == 1.0:
        return model(x, times, labels).float()
    if guide is None:
        null = torch.full_like(labels, null_class)
        twice = (torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, null]))
        conditional, other = model(*twice).float().chunk(2)
    else:
        conditional, other = (field(x, times, labels).float() for field in (model, guide))
    guided = other + scale * (conditional - other)
    if channels is None:
        return guided
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def sample_ode(
    model: Velocity,
    noise: Tensor,
    labels: Tensor,
    num_steps: int = 250,
    shift: float = 1.0,
    guidance: Sequence[GuidanceInterval] = (),
    null_class: int = 0,
    guidance_channels: int | None = None,
    guide: Velocity | None = None,
    second_order: bool = False,
) -> Tensor:
    """Samples, float32 like `noise` [B, ...], by Euler steps of dx = v dt from t = 1 to t = 0.

    With `second_order` by Heun's method: a step has the mean of the velocities at both of its ends,
    so it costs two. The last step remains Euler's, as in algorithm 1 of arXiv 2206.00364: networks
    are hardly trained at t = 0.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        scale = guidance_scale(t, guidance)
        return guided_velocity(model, x, t, labels, null_class, scale, guidance_channels, guide)

    x = noise.float()
    for t, following in itertools.pairwise(timestep_grid(num_steps, shift)):
        step, v = following - t, velocity(x, t)
        if second_order and following > 0.0:
            v = (v + velocity(x + step * v, following)) / 2
        x = x + step * v
    return x


def sample_sde(
    model: Velocity,
    noise: Tensor,
    labels: Tensor,
    step_noise: Callable[[int], Tensor],
    num_steps: int = 250,
    shift: float = 1.0,
    guidance: Sequence[GuidanceInterval] = (),
    null_class: int = 0,
    guidance_channels: int | None = None,
    diffusion_scale: float = 1.0,
    last_step: float | None = None,
    guide: Velocity | None = None,
) -> Tensor:
    """Samples by Euler-Maruyama steps of the reverse SDE with w_t = `diffusion_scale`·t.

    dx = (v - w/2·score) dt + sqrt(w) dW backwards in time, where score = -(x + (1-t)·v) / t, so
    w·score has no singularity at t = 0. `noise` [B, ...] and `step_noise(i)`, for step i, are
    standard normal; the last step adds no noise, and `last_step` is its length (see
    `timestep_grid`). Returns float32.
    """
    x = noise.float()
    grid = timestep_grid(num_steps, shift, last_step)
    for index, (t, following) in enumerate(itertools.pairwise(grid)):
        scale = guidance_scale(t, guidance)
        v = guided_velocity(model, x, t, labels, null_class, scale, guidance_channels, guide)
        drift = v + 0.5 * diffusion_scale * (x + (1.0 - t) * v)
        step = t - following
        x = x - step * drift
        if index < num_steps - 1:
            x = x + (diffusion_scale * t * step) ** 0.5 * step_noise(index).to(x, non_blocking=True)
    return x
