"""Random numbers addressed by (seed, stream, step, sample), so that rank, batching and interruptions cannot change them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CPU = torch.device("cpu")


def sample_generator(
    seed: int, stream: str, step: int, sample: int, device: torch.device = CPU
) -> torch.Generator:
    """A generator that depends on these four alone: never on rank, accumulation or what was drawn before.

    A GPU's gives other numbers than a CPU's.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}/{sample}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)


def normal_draws(
    seed: int,
    stream: str,
    step: int,
    samples: list[int],
    shape: tuple[int, ...],
    device: torch.device = CPU,
) -> Tensor:
    """Standard normal numbers [n, *shape] float32, drawn on `device`, one generator a sample."""
    draws = torch.empty((len(samples), *shape), device=device)
    for draw, sample in zip(draws, samples, strict=True):
        draw.normal_(generator=sample_generator(seed, stream, step, sample, device))
    return draws


def uniform_draws(
    seed: int,
    stream: str,
    step: int,
    samples: list[int],
    shape: tuple[int, ...] = (),
    device: torch.device = CPU,
) -> Tensor:
    """Uniform numbers in [0, 1) [n, *shape] float32 on `device`, one generator a sample.

    Drawn on the CPU, so they are the same everywhere; the copy to a GPU does not wait for what it computes.
    """
    draws = [
        torch.rand(shape, generator=sample_generator(seed, stream, step, sample))
        for sample in samples
    ]
    return torch.stack(draws).to(device, non_blocking=True)
