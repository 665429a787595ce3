"""One optimizer step: learning rate, accumulation, clipping and the check for finite numbers.

The loop calls `train_step`; benchmarks/train.py measures it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fae_core.errors import UserError
from fae_core.precision import autocast

from ..config.sections import TrainingSection
from .batches import Batch
from .distributed import is_sharded
from .job import AdversaryLoss, LossFunction
from .state import TrainState

MAX_KEYS_IN_ERROR = 32


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradient is NaN or infinite; the message names the step and the batch's keys."""


class NonFiniteGradientError(NonFiniteError):
    """The losses are finite, and the gradient, which all workers share, is not."""


def learning_rate(step: int, training: TrainingSection) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant or a cosine."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return (
        training.final_learning_rate
        + (training.learning_rate - training.final_learning_rate) * cosine
    )


def train_step(
    state: TrainState,
    wrapped: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    training: TrainingSection,
    wrapped_adversary: nn.Module | None = None,
    adversary_loss: AdversaryLoss | None = None,
) -> dict[str, Tensor]:
    """One optimizer step over `batches`, this worker's micro-batches; 0-dim means by name.

    These are the loss terms and `gradient_norm`. Each mean loss is scaled by the images of its
    micro-batch over the planned ones, so the gradient is the sum over all images divided by the
    planned batch size, however the batch is split. `wrapped` is the model, or DDP around it. Model
    and adversary both step from their weights before the step. Raises NonFiniteError before any
    parameter changes.
    """
    relative_rate = learning_rate(state.step, training) / training.learning_rate
    for network in state.networks.values():
        network.prepare(relative_rate)
    totals: dict[str, Tensor] = {}
    finite: list[Tensor] = []
    adversary_steps = False
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        scale = batch.weight / len(batches)
        # A sharded model gathers a layer at a time, so that no worker holds all.
        lower = autocast(training.precision, batch.device, keeps_casts=not is_sharded(state.model))
        with _synchronized(wrapped, last):
            with lower:
                terms = loss(wrapped, batch)
            (terms["loss"] * scale).backward()
        if wrapped_adversary is not None and adversary_loss is not None:
            with _synchronized(wrapped_adversary, last):
                with lower:
                    judged = adversary_loss(wrapped_adversary, batch)
                if judged is not None:
                    (judged["adversary_loss"] * scale).backward()
                    terms = {**terms, **judged}
                    adversary_steps = True
        losses = [value.detach() for name, value in terms.items() if name.endswith("loss")]
        finite.append(torch.stack(losses).isfinite().all())
        for name, value in terms.items():
            total = totals.get(name, torch.zeros((), device=value.device))
            totals[name] = total + value.detach() * scale
    stepping = [
        network
        for name, network in state.networks.items()
        if name != "adversary" or adversary_steps
    ]
    norms = [network.clip_gradients() for network in stepping]
    # The step waits for the device here alone: until now no value was read.
    sound = torch.stack([*finite, *(norm.isfinite() for norm in norms)]).tolist()
    if not all(sound):
        suspects = [batch for batch, good in zip(batches, sound, strict=False) if not good]
        what = f"loss {float(totals['loss'])}, gradient norm {float(norms[0])}"
        raise _non_finite(f"Step {state.step}: {what}.", suspects, batches)
    if adversary_steps and state.adversary is not None:
        state.adversary.after_step(totals, sum(batch.weight for batch in batches) / len(batches))
    for network in stepping:
        network.optimizer.step()
    state.update_ema()
    state.step += 1
    return {**totals, "gradient_norm": norms[0].detach()}


def _non_finite(what: str, suspects: Sequence[Batch], batches: Sequence[Batch]) -> NonFiniteError:
    """The error of a step where the losses of `suspects` are not finite, or else the gradient."""
    keys = [key for batch in suspects or batches for key in batch.keys]
    more = f" and {len(keys) - MAX_KEYS_IN_ERROR} more" if len(keys) > MAX_KEYS_IN_ERROR else ""
    kind = NonFiniteError if suspects else NonFiniteGradientError
    workers = "" if suspects else " With several workers it may be the images of another worker."
    return kind(
        f"{what} The images of this batch: {', '.join(keys[:MAX_KEYS_IN_ERROR])}{more}.{workers} "
        "The last checkpoint is from before this step; look at these images, lower the learning "
        "rate or set the precision to fp32."
    )


def _synchronized(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside it, a backward pass averages gradients over the workers if it is the `last`."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    no_sync = getattr(module, "no_sync", None)
    return contextlib.nullcontext() if last or no_sync is None else no_sync()
