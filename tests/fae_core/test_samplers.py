"""Samplers on fields known in closed form: a Gaussian and a mixture of two, whose moments must come
back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fae_core.samplers import (
    PAPER_GUIDANCE,
    GuidanceInterval,
    guidance_scale,
    sample_ode,
    sample_sde,
    timestep_grid,
)

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 2.0], dtype=torch.float64)
CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
SPREAD = 0.4
LABELS = torch.zeros(20000, dtype=torch.int64)


def posterior_velocity(x: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E[noise - data | x_t] for data N(mean, variance): linear in x."""
    total = (1 - t) ** 2 * variance + t**2
    data = mean + (1 - t) * variance / total * (x - (1 - t) * mean)
    noise = t / total * (x - (1 - t) * mean)
    return noise - data


def gaussian(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return posterior_velocity(x.double(), t.double()[:, None], MEAN, STD**2)


def mixture(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    x, t = x.double(), t.double()[:, None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    distance = (x[:, None] - (1 - t)[:, None] * CENTRES).square().sum(-1)
    belongs = torch.softmax(WEIGHTS.log() - 0.5 * distance / variance, dim=1)
    each = [posterior_velocity(x, t, centre, torch.tensor(SPREAD**2)) for centre in CENTRES]
    return sum(belongs[:, i : i + 1] * v for i, v in enumerate(each))


def noise(seed: int) -> Tensor:
    return torch.randn(len(LABELS), 2, generator=torch.Generator().manual_seed(seed))


def step_noise(step: int) -> Tensor:
    return noise(1000 + step)


def test_the_ode_brings_a_gaussian_to_its_mean_and_covariance() -> None:
    samples = sample_ode(gaussian, noise(0), LABELS, num_steps=200).double()
    assert torch.allclose(samples.mean(0), MEAN, atol=0.04)
    assert torch.allclose(torch.cov(samples.T), torch.diag(STD**2), atol=0.12)


def test_the_sde_brings_a_gaussian_to_its_mean_and_covariance() -> None:
    samples = sample_sde(gaussian, noise(0), LABELS, step_noise, num_steps=200).double()
    assert torch.allclose(samples.mean(0), MEAN, atol=0.04)
    assert torch.allclose(torch.cov(samples.T), torch.diag(STD**2), atol=0.12)


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_ode_and_sde_agree_on_a_mixture_with_its_true_moments(shift: float) -> None:
    true_mean = WEIGHTS @ CENTRES
    centred = CENTRES - true_mean
    true_covariance = SPREAD**2 * torch.eye(2) + (WEIGHTS[:, None] * centred).T @ centred
    ode = sample_ode(mixture, noise(0), LABELS, 200, shift).double()
    sde = sample_sde(mixture, noise(0), LABELS, step_noise, 200, shift).double()
    for samples in (ode, sde):
        assert torch.allclose(samples.mean(0), true_mean, atol=0.06)
        assert torch.allclose(torch.cov(samples.T), true_covariance, atol=0.15)
        assert (samples[:, 0] < 0).double().mean() == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize(("second_order", "order"), [(False, 1.0), (True, 2.0)])
def test_the_odes_error_falls_with_the_order_of_its_method(
    second_order: bool, order: float
) -> None:
    start = noise(0)
    # The exact flow of a Gaussian: quantiles stay quantiles.
    exact = MEAN + STD * start.double()

    def error(steps: int) -> float:
        found = sample_ode(gaussian, start, LABELS, steps, second_order=second_order).double()
        return (found - exact).square().mean().sqrt().item()

    errors = [error(steps) for steps in (16, 32, 64, 128)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.1), errors


def test_heuns_steps_take_the_mean_of_both_ends_and_the_last_is_eulers() -> None:
    seen = []

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(round(float(t[0]), 6))
        return t[:, None].expand_as(x)

    samples = sample_ode(field, torch.zeros(1, 2), LABELS[:1], 4, second_order=True)
    assert seen == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    # The integral of t from 1 to 0.25 is exact, and 0.25 · 0.25 comes after it.
    assert samples[0].tolist() == pytest.approx([-(0.5 - 0.25**2 / 2 + 0.25**2)] * 2)


def test_a_guide_takes_the_place_of_the_null_class() -> None:
    sizes = []

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.where((labels == 7)[:, None], 100.0, 3.0).expand_as(x)

    def weaker(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert labels.tolist() == [0, 1]
        return torch.full_like(x, 2.0)

    guided = {"guidance": [GuidanceInterval(0.5, 0.0, 2.0)], "null_class": 7, "guide": weaker}
    start, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    samples = sample_ode(field, start, labels, 4, **guided)
    assert sizes == [2, 2, 2, 2]
    # Velocity 3 for the first half, 2 + 2·(3 - 2) = 4 for the second, walked from 1 to 0.
    assert torch.allclose(samples, torch.full((2, 2), -(0.5 * 3 + 0.5 * 4)))
    still = sample_sde(
        field, start, labels, lambda _: torch.zeros(2, 2), 4, diffusion_scale=0.0, **guided
    )
    assert torch.allclose(still, samples)


def test_the_shifted_grid_spends_more_steps_near_the_noise() -> None:
    grid = timestep_grid(10, 2.5)
    assert grid[0] == 1.0 and grid[-1] == 0.0
    assert sorted(grid, reverse=True) == grid
    assert sum(t > 0.5 for t in grid) > sum(t > 0.5 for t in timestep_grid(10))


def test_the_papers_guidance_has_three_parts() -> None:
    scales = [guidance_scale(t, PAPER_GUIDANCE) for t in (1.0, 0.95, 0.9, 0.8, 0.7, 0.1)]
    assert scales == [0.9, 0.9, 1.0, 1.0, 2.5, 2.5]


def test_guidance_doubles_the_batch_only_where_its_scale_is_not_one() -> None:
    sizes = []

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.where((labels == 7)[:, None], 1.0, 3.0).expand_as(x)

    start = torch.zeros(2, 2)
    samples = sample_ode(
        field,
        start,
        torch.tensor([0, 1]),
        4,
        guidance=[GuidanceInterval(0.5, 0.0, 2.0)],
        null_class=7,
    )
    assert sizes == [2, 2, 4, 4]
    # Velocity 3 for the first half, 1 + 2·(3 - 1) = 5 for the second, walked from 1 to 0.
    assert torch.allclose(samples, torch.full((2, 2), -(0.5 * 3 + 0.5 * 5)))


def test_a_field_sees_the_times_of_the_grid() -> None:
    seen = []

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(round(float(t[0]), 6))
        return torch.zeros_like(x)

    sample_ode(field, torch.zeros(1, 2), LABELS[:1], 4)
    assert seen == [1.0, 0.75, 0.5, 0.25]


def sit_sde(start: Tensor, num_steps: int, norm: float, last: float) -> Tensor:
    """SiT's Euler-Maruyama in its own terms: t = 0 is the noise, w = 2·norm·sigma, a mean step."""

    def drift(x: Tensor, t: float) -> Tensor:
        velocity = -gaussian(x, torch.full((len(x),), 1 - t), LABELS[: len(x)])
        score = (t * velocity - x) / (1 - t)
        return velocity + norm * (1 - t) * score

    x = start.double()
    times = torch.linspace(0.0, 1.0 - last, num_steps, dtype=torch.float64).tolist()
    for step, (t, following) in enumerate(itertools.pairwise(times)):
        dt = following - t
        x = x + drift(x, t) * dt + (2 * norm * (1 - t) * dt) ** 0.5 * step_noise(step)[: len(x)]
    return x + drift(x, times[-1]) * last


@pytest.mark.parametrize(("norm", "last"), [(1.0, 0.04), (0.5, 0.1)])
def test_the_sde_is_that_of_sits_code(norm: float, last: float) -> None:
    start, steps = noise(0)[:64], 25
    ours = sample_sde(
        gaussian,
        start,
        LABELS[:64],
        lambda step: step_noise(step)[:64],
        steps,
        diffusion_scale=2 * norm,
        last_step=last,
    )
    assert torch.allclose(ours.double(), sit_sde(start, steps, norm, last), atol=1e-5)


def test_a_gaussian_keeps_its_moments_for_every_diffusion() -> None:
    for scale in (0.0, 1.0, 2.0):
        samples = sample_sde(
            gaussian, noise(0), LABELS, step_noise, 200, diffusion_scale=scale, last_step=0.005
        ).double()
        assert torch.allclose(samples.mean(0), MEAN, atol=0.04)
        assert torch.allclose(torch.cov(samples.T), torch.diag(STD**2), atol=0.12)


def test_without_diffusion_the_sde_is_the_ode() -> None:
    start = noise(0)
    ode = sample_ode(gaussian, start, LABELS, 20)
    sde = sample_sde(gaussian, start, LABELS, step_noise, 20, diffusion_scale=0.0)
    assert torch.equal(ode, sde)


def test_the_grid_of_lightningdit_is_ours_with_one_step_less_and_the_reciprocal_shift() -> None:
    points = torch.linspace(0.0, 1.0, 250, dtype=torch.float64)  # its 250 "steps"
    theirs = 0.3 * points / (1 + (0.3 - 1) * points)
    ours = torch.tensor(timestep_grid(249, 1 / 0.3), dtype=torch.float64)
    assert torch.allclose(ours, 1 - theirs, atol=1e-9)


def test_only_the_first_channels_are_guided_where_that_is_asked() -> None:
    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.where((labels == 7)[:, None], 1.0, 3.0).expand_as(x)

    samples = sample_ode(
        field,
        torch.zeros(2, 5),
        torch.tensor([0, 1]),
        4,
        guidance=[GuidanceInterval(1.0, 0.0, 2.0)],
        null_class=7,
        guidance_channels=3,
    )
    assert samples.tolist() == [[-5.0, -5.0, -5.0, -3.0, -3.0]] * 2


def test_a_last_step_needs_another_before_it() -> None:
    assert timestep_grid(3, 1.0, 0.04) == pytest.approx([1.0, 0.52, 0.04, 0.0])
    with pytest.raises(ValueError, match="two with a last step"):
        timestep_grid(1, 1.0, 0.04)
