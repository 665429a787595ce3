"""What a trainer supplies to the training loop: model, data feed, losses, validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fae_core.errors import UserError

from .batches import Batch

Feed = Callable[[int, int, int, torch.device], Iterator[Batch]]
"""(first step, rank, number of workers, device) -> every micro-batch of this worker from that step on."""
LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]
AdversaryLoss = Callable[[nn.Module, Batch], dict[str, Tensor] | None]
Validation = Callable[[nn.Module, int], tuple[dict[str, float], bytes | None]]


class TrainingError(UserError, RuntimeError):
    """A run that cannot start or went wrong; the message says what to do."""


@dataclass(frozen=True)
class Adversary:
    """A second network that is trained beside the model on each micro-batch, just after the model's backward pass.

    `loss(adversary, batch)` returns terms with a 0-dim mean `adversary_loss`, or None while it is not its turn; no
    gradient of it may reach the model.
    """

    module: nn.Module
    loss: AdversaryLoss
    learning_rate: float


@dataclass(frozen=True)
class Job:
    """What a trainer supplies: the module to train, its data, `loss(model, batch)` with a 0-dim mean `loss` among its
    terms, `validate(model, step)` that returns metrics and a PNG (rank 0 calls it), and the frozen networks that stand
    beside the model, for the memory plan."""

    model: nn.Module
    feed: Feed
    loss: LossFunction
    validate: Validation | None = None
    adversary: Adversary | None = None
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
