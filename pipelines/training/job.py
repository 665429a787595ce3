"""What a trainer hands to the training loop: the networks, and the functions that the loop calls.

A trainer (autoencoder.py, pixel_decoder.py, generator.py) makes a `Job`, a feed and a validation;
`run_job` in loop.py trains with them, and memory_plan.py measures the job alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fae_core.errors import UserError

from ..config.sections import TrainingSection
from .batches import Batch

Feed = Callable[[int, int, int, torch.device], Iterator[Batch]]
"""(first step, rank, number of workers, device) -> the worker's micro-batches from that step on."""
LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""(model, micro-batch) -> 0-dim means by name; the one called `loss` is minimized."""
AdversaryLoss = Callable[[nn.Module, Batch], dict[str, Tensor] | None]
"""(adversary, micro-batch) -> 0-dim means by name, or None in a step that does not train it."""
Validation = Callable[[nn.Module, int], tuple[dict[str, float], bytes | None]]
"""(model, step) -> metrics by name and a figure as PNG; rank 0 alone calls it."""


UntrainedJob = tuple["Job", Callable[[int], Batch]]
"""A job with initial weights, and (number of images) -> a blank micro-batch for it."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot start or cannot continue; the message says what to do."""


def check_batch(training: TrainingSection, num_workers: int) -> None:
    """Raises TrainingError where the batch has no equal parts for workers and accumulation."""
    if training.batch_size % (num_workers * training.accumulation):
        raise TrainingError(
            f"training.batch_size={training.batch_size} is not divisible by num_workers x "
            f"accumulation = {num_workers} x {training.accumulation}."
        )


@dataclass(frozen=True)
class Adversary:
    """A second network, trained on each micro-batch just after the model's backward pass.

    Its loss is the term `adversary_loss`; no gradient of it may reach the model.
    """

    module: nn.Module
    loss: AdversaryLoss
    learning_rate: float


@dataclass(frozen=True)
class Job:
    """The networks of a training and their losses; `frozen` are those that only compute, by name.

    `model` may be wrapped for data parallelism when `loss` is called with it.
    """

    model: nn.Module
    loss: LossFunction
    adversary: Adversary | None = None
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def networks(self) -> list[nn.Module]:
        """All of them, the trained ones first."""
        trained = [self.model, *([self.adversary.module] if self.adversary else [])]
        return [*trained, *self.frozen.values()]
