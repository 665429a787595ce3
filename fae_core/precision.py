"""The precision `auto`: bf16 where a device multiplies matrices in it faster than in float32."""

from __future__ import annotations

from typing import Literal

import torch

INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Of CPUs that multiply bfloat16 matrices. Others convert every number and are slower
than in float32 (docs/benchmarks.md)."""


def settled_precision(
    precision: str, gpus: float = 0.0, before: object = None
) -> Literal["fp32", "bf16"]:
    """What `precision` (auto, fp32 or bf16) means for a job with so many `gpus` a process.

    `auto` is what the job has begun with (`before`), so that a resumed job keeps it. A new job
    takes bf16 on GPUs and where this machine's processor has instructions for it, else fp32.
    """
    wanted = before if precision == "auto" and before in ("fp32", "bf16") else precision
    if wanted == "auto":
        found = torch.cpu.get_capabilities()
        is_fast = gpus > 0 or any(found.get(name) for name in INSTRUCTIONS)
        wanted = "bf16" if is_fast else "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


def autocast(precision: str, device: torch.device, keeps_casts: bool = True) -> torch.autocast:
    """A context in which `device` computes in `precision`: auto, fp32 or bf16.

    With `keeps_casts` it keeps the bfloat16 copies of all weights, of which some are used twice.
    """
    enabled = settled_precision(precision, device.type == "cuda") == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=keeps_casts)


def autocast_to(weights: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which `device` computes in the dtype of half-precision `weights`."""
    half = weights in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, weights if half else torch.bfloat16, enabled=half)
