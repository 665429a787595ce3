"""The path and its timestep shift: directions, distributions, and the loss at the true velocity."""

from __future__ import annotations

import pytest
import torch

from fae_core.flow_matching import (
    PAPER_SHIFT,
    flow_matching_loss,
    interpolate,
    shift_timesteps,
    timesteps,
)

T = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)


def test_the_papers_shift_moves_times_towards_the_noise() -> None:
    shifted = shift_timesteps(T, PAPER_SHIFT)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > T[1:-1]).all()


def test_the_papers_shift_is_lightningdits_0_4_seen_from_the_other_end() -> None:
    data_time, s = 1.0 - T, 0.4  # LightningDiT: t = 1 is data
    theirs = s * data_time / (1.0 + (s - 1.0) * data_time)
    assert torch.allclose(shift_timesteps(T, PAPER_SHIFT), 1.0 - theirs)


@pytest.mark.parametrize(
    ("distribution", "median_of_shifted"), [("uniform", 2.5 / 3.5), ("lognormal", 2.5 / 3.5)]
)
def test_training_times_have_the_distribution_that_was_asked_for(
    distribution: str, median_of_shifted: float
) -> None:
    draws = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, shifted = timesteps(draws, distribution), timesteps(draws, distribution, 2.5)
    quartile = {"uniform": 0.25, "lognormal": 0.3375}[distribution]  # sigmoid(-0.6745)
    assert plain.quantile(0.25) == pytest.approx(quartile, abs=0.01)
    assert plain.median() == pytest.approx(0.5, abs=0.01)
    assert shifted.median() == pytest.approx(median_of_shifted, abs=0.01)


def test_the_path_runs_from_data_to_noise() -> None:
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(interpolate(x, noise, torch.tensor([0.0, 1.0]))[0], x[0])
    assert torch.equal(interpolate(x, noise, torch.tensor([0.0, 1.0]))[1], noise[1])


def test_the_true_velocity_has_no_loss_and_a_wrong_one_its_square() -> None:
    x, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9])
    labels = torch.zeros(2, dtype=torch.int64)
    true = flow_matching_loss(lambda *_: noise - x, x, noise, t, labels, cosine_weight=1.0)
    assert true["loss"] == pytest.approx(0.0, abs=1e-6)
    wrong = flow_matching_loss(lambda *_: noise - x + 2.0, x, noise, t, labels)
    assert wrong["loss"] == pytest.approx(4.0, rel=1e-5)
    opposite = flow_matching_loss(lambda *_: x - noise, x, noise, t, labels, cosine_weight=1.0)
    assert opposite["loss"] - opposite["velocity_mse"] == pytest.approx(2.0, rel=1e-5)
