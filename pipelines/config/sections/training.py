"""How one network is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from .base import Execution, Section


class TrainingSection(Section):
    """How one network is trained; each trainer has its own, with the paper's values for it in the recipes."""

    steps: int = Field(1_000_000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(1024, gt=0)
    """Images of one optimizer step, over all workers and accumulation."""
    accumulation: int = Field(1, gt=0)
    """Micro-steps that one optimizer step is split into."""
    learning_rate: float = Field(1e-4, gt=0.0)
    warmup_steps: int = Field(1000, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_learning_rate: float = Field(0.0, ge=0.0)
    """Where the cosine ends; not in the paper."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0.0)
    """Not in the paper; 0.05 is the public reimplementations'."""
    gradient_clip: float | None = Field(1.0, gt=0.0)
    """Largest global gradient norm; not in the paper."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Exponential moving average of the weights, shorter in the first steps; not in the paper."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast dtype of the forward passes; not in the paper."""
    compile: Execution[bool] = False
    """torch.compile the network and the frozen ones beside it: minutes at the start, faster steps after."""
    num_workers: Execution[int] = Field(1, gt=0)
    parallel: Execution[Literal["ddp", "fsdp"]] = "ddp"
    """Between workers: a copy of the network each, or its parameters split over them."""
    use_gpu: Execution[bool] = False
    cpus_per_worker: Execution[float] = Field(1.0, gt=0.0)
    threads_per_worker: Execution[int | None] = Field(None, gt=0)
    """Torch threads of a CPU worker; without it the run's workers share all the cores of their node."""
    log_every: Execution[int] = Field(50, gt=0)
    validate_every: Execution[int] = Field(1000, gt=0)
    checkpoint_every: Execution[int] = Field(1000, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: Execution[int] = Field(2, gt=0)
    max_failures: Execution[int] = Field(3, ge=0)
    """How often training goes on by itself from the newest checkpoint after workers or nodes were lost; errors end it at once."""
