"""Random numbers that depend on (seed, stream, step, sample) alone.

Rank, batch size, gradient accumulation and interruptions do not change them, so a run on two
workers draws the same numbers as a run on one, and so does a resumed run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CPU = torch.device("cpu")


def sample_generator(
    seed: int, stream: str, step: int, sample: int, device: torch.device = CPU
) -> torch.Generator:
    """A generator on `device`, seeded by a hash of (seed, stream, step, sample).

    A generator on a GPU gives other numbers than one on the CPU.
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
    """Standard normal numbers [n, *shape] float32 for n `samples`, one generator for each.

    They are drawn on `device`.
    """
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
    """Uniform numbers in [0, 1), [n, *shape] float32 on `device`, one generator for each sample.

    They are drawn on the CPU, so they are the same for every device. The copy to a GPU is
    asynchronous: it does not wait for kernels that are running.
    """
    draws = [
        torch.rand(shape, generator=sample_generator(seed, stream, step, sample))
        for sample in samples
    ]
    return torch.stack(draws).to(device, non_blocking=True)
