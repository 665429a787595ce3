"""What the samplers' settings of public code do to the Fréchet distance, on exact velocities.

    python -m benchmarks.protocols [--samples 20000] [--channels 16] [--classes 10] [--train STEPS]

The data are a mixture of Gaussians, one a class, with zero mean and unit variance in every channel.
Its velocity, with and without a class, is known in closed form, so no network errs: what differs
from the data's own moments is the sampler's alone. The distance is of the samples' moments from the
exact ones; "drawn from the mixture" is what so many samples have by chance. With --train a small
diffusion transformer learns the velocity in so many steps, and is sampled in its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import describe
from fae_core.flow_matching import Velocity, flow_matching_loss
from fae_core.generators.dit import DiT, DiTConfig, drop_labels
from fae_core.metrics.frechet import Gaussian, Moments, frechet_distance
from fae_core.samplers import GuidanceInterval, sample_ode, sample_sde


class Mixture:
    """Classes of equal weight, class k being N(mean[k], diag(variance[k])); `null` is no class."""

    def __init__(self, num_classes: int, channels: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_classes, channels)
        mean = torch.randn(shape, generator=generator, dtype=torch.float64)
        variance = 0.1 + torch.rand(shape, generator=generator, dtype=torch.float64)
        mean = mean - mean.mean(0)
        total = variance.mean(0) + mean.square().mean(0)
        self.mean, self.variance = mean / total.sqrt(), variance / total
        self.null = num_classes

    def moments(self) -> Gaussian:
        """Mean and covariance of the whole mixture."""
        covariance = self.mean.T @ self.mean / self.null + torch.diag(self.variance.mean(0))
        return Gaussian(np.zeros(len(covariance)), covariance.numpy())

    def draw(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Data [n, C] of classes `labels` [n], from standard normal `noise`."""
        return self.mean[labels] + self.variance[labels].sqrt() * noise

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """E[noise - data | x_t] [n, C] at times t [n]; of the whole mixture where label = null."""
        x, t = x.double(), t.double()[0]
        spread = (1 - t) ** 2 * self.variance + t**2
        centre = (1 - t) * self.mean
        # The squared distance from every class, multiplied out: matrices instead of [n, K, C].
        squared = x.square() @ (1 / spread).T - 2 * x @ (centre / spread).T
        squared += (centre.square() / spread + spread.log()).sum(1)
        others = (labels[:, None] != self.null) & (labels[:, None] != torch.arange(self.null))
        belongs = (-0.5 * squared).masked_fill(others, -torch.inf).softmax(1)
        slope = (t - (1 - t) * self.variance) / spread
        return x * (belongs @ slope) - belongs @ (slope * centre + self.mean)


def trained(mixture: Mixture, num_steps: int, batch: int = 512) -> Velocity:
    """The velocity [n, C] of a DiT of one token that was trained on the mixture."""
    channels = mixture.mean.shape[1]
    torch.manual_seed(0)
    shape = DiTConfig(channels, (1, 1), 48, depth=2, num_heads=2, num_classes=mixture.null)
    model = DiT(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        labels = torch.randint(mixture.null, (batch,))
        data = mixture.draw(labels, torch.randn(batch, channels, dtype=torch.float64)).float()
        known = drop_labels(labels, torch.rand(batch) < 0.1, mixture.null)
        data, noise = (x[..., None, None] for x in (data, torch.randn(batch, channels)))
        loss = flow_matching_loss(model, data, noise, torch.rand(batch), known)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model(x[..., None, None], t, labels)[..., 0, 0]

    return velocity


def distance(samples: Tensor, mixture: Mixture) -> float:
    """Fréchet distance of samples [n, C] from the mixture."""
    return frechet_distance(Moments.of(samples.numpy()).gaussian(), mixture.moments())


def rows(mixture: Mixture, velocity: Velocity, count: int) -> Iterator[tuple[str, float]]:
    """The table, row by row: settings, and the distance of `count` samples by `velocity`."""
    channels = mixture.mean.shape[1]
    labels = torch.arange(count) % mixture.null
    noise = torch.randn(count, channels, generator=torch.Generator().manual_seed(1))

    def step_noise(step: int) -> Tensor:
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(1000 + step))

    def sde(num_steps: int, **settings: Any) -> float:
        x = sample_sde(velocity, noise, labels, step_noise, num_steps, **settings)
        return distance(x, mixture)

    def ode(start: float, scale: float, guided: int | None) -> float:
        x = sample_ode(
            velocity,
            noise,
            labels,
            250,
            guidance=[GuidanceInterval(start, 0.0, scale)],
            null_class=mixture.null,
            guidance_channels=guided,
        )
        return distance(x, mixture)

    yield "drawn from the mixture", distance(mixture.draw(labels, noise.double()), mixture)
    for steps in (50, 250):
        for scale in (1.0, 2.0):
            for last in (None, 0.04):
                name = f"SDE, {steps} steps, w = {scale:g}σ, last step {last or 1 / steps:g}"
                yield name, sde(steps, diffusion_scale=scale, last_step=last)
    yield "ODE, 250 steps", ode(1.0, 1.0, None)
    for evaluations in (9, 15, 25, 51):
        for name, steps in (("Euler", evaluations), ("Heun", (evaluations + 1) // 2)):
            x = sample_ode(velocity, noise, labels, steps, second_order=name == "Heun")
            yield f"ODE, {name}, {evaluations} evaluations", distance(x, mixture)
    for start, scale in ((0.7, 2.5), (0.875, 6.7)):
        for guided in (None, 3):
            which = "all channels" if guided is None else f"{guided} of {channels} channels"
            name = f"ODE, 250 steps, guidance {scale:g} from t = {start:g}, {which}"
            yield name, ode(start, scale, guided)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--train", type=int, default=0)
    arguments = parser.parse_args()
    print(describe())
    mixture = Mixture(arguments.classes, arguments.channels)
    velocity = trained(mixture, arguments.train) if arguments.train else mixture.velocity
    for name, value in rows(mixture, velocity, arguments.samples):
        print(f"| {name} | {value:.4f} |", flush=True)


if __name__ == "__main__":
    main()
