"""What a trainer hands to the training loop: the networks, and the functions that the loop calls.

A trainer (autoencoder.py, pixel_decoder.py, generator.py) makes a `Job`, a feed and a validation;
`run_job` in loop.py trains with them, and memory_plan.py measures the job alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

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


def check_batch(training: TrainingSection) -> None:
    """Raises TrainingError where the batch has no equal parts for workers and accumulation.

    Fewer workers than `num_workers` need no equal parts, but at least two images in each.
    """
    num = training.num_workers * training.accumulation
    said = f"training.batch_size={training.batch_size}"
    parts = f"num_workers x accumulation = {training.num_workers} x {training.accumulation}"
    if training.batch_size % num:
        raise TrainingError(f"{said} is not divisible by {parts}.")
    if training.fewest_workers < training.num_workers and training.batch_size == num > 1:
        raise TrainingError(
            f"{said} is one image for each of {parts}. With min_workers it must be two or more."
        )


class Part(NamedTuple):
    """A micro-batch: its places in the global batch, and their number over the mean of all parts.

    Losses are means over a part; with these weights their mean is that of the whole batch.
    """

    places: range
    weight: float


def parts_of(training: TrainingSection, rank: int, world_size: int) -> list[Part]:
    """The parts of each global batch that worker `rank` takes, one after the other.

    On `num_workers` workers there are `accumulation` of the same size. On fewer workers the batch
    is the same, and each takes more parts: none is larger than before, and some are smaller by one
    image. A step then takes longer, and no more memory.
    """
    size = training.batch_size
    each = -(-training.num_workers * training.accumulation // world_size)
    num = world_size * each
    own = range(rank * each, (rank + 1) * each)
    cut = [range(i * size // num, (i + 1) * size // num) for i in own]
    return [Part(places, len(places) * num / size) for places in cut]


@dataclass(frozen=True)
class Adversary:
    """A second network, trained on each micro-batch just after the model's backward pass.

    Its loss is the term `adversary_loss`; no gradient of it may reach the model. `after_step` is
    called by every worker in each step that trains it, with the worker's mean terms and the share
    of its planned images that could be decoded.
    """

    module: nn.Module
    loss: AdversaryLoss
    learning_rate: float
    after_step: Callable[[Mapping[str, Tensor], float], None]


@dataclass(frozen=True)
class Job:
    """The networks of a training and their losses; `frozen` are those that only compute, by name.

    `model` may be wrapped for data parallelism when `loss` is called with it. `retains_graph` says
    that `loss` itself computes gradients.
    """

    model: nn.Module
    loss: LossFunction
    adversary: Adversary | None = None
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    retains_graph: bool = False

    @property
    def networks(self) -> list[nn.Module]:
        """All of them, the trained ones first."""
        trained = [self.model, *([self.adversary.module] if self.adversary else [])]
        return [*trained, *self.frozen.values()]
