"""What a checkpoint holds: networks with their optimizers, moving average, step and RNG.

The loop trains a `TrainState`; checkpoints.py writes it to a file and reads it back.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config.sections import TrainingSection
from .distributed import distributed_like, gathered
from .job import Adversary, TrainingError


class CheckpointDamaged(TrainingError):
    """Bytes that are not those of a checkpoint as it was written."""


class TrainState:
    """Model and adversary with their optimizers, the model's moving average, and the step."""

    def __init__(
        self, model: nn.Module, training: TrainingSection, adversary: Adversary | None = None
    ) -> None:
        self.model = model
        self.step = 0
        self.networks = {"model": TrainedNetwork(model, training, training.learning_rate)}
        if adversary:
            self.networks["adversary"] = TrainedNetwork(
                adversary.module, training, adversary.learning_rate
            )
        self.ema_decay = training.ema_decay
        self.ema = (
            [p.detach().clone() for p in self.networks["model"].parameters]
            if training.ema_decay
            else []
        )

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the weights, where the recipe keeps one."""
        if self.ema_decay is not None:
            decay = ema_decay(self.step, self.ema_decay)
            # All tensors in a few kernels: a GPU would wait for the CPU to launch hundreds.
            get_ema_multi_avg_fn(decay)(self.ema, self.networks["model"].parameters, self.step)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, where the recipe keeps an average."""
        self.swap_ema()
        try:
            yield
        finally:
            self.swap_ema()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange the model's weights and their average; nothing where the recipe keeps none."""
        for average, parameter in zip(self.ema, self.networks["model"].parameters, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds, with gathered tensors: those of the state itself, no copies.

        All workers of a sharded model must call it together.
        """
        return {
            "step": self.step,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "ema": gathered(self.ema),
            "rng": torch.get_rng_state(),
        }

    def load(self, path: Path) -> None:
        """Take over what `write_content` wrote, without unpickling code.

        The file is mapped into memory, not read as a whole. Raises CheckpointDamaged, and the state
        is then as it was.
        """
        state = _verified(path)
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for average, saved in zip(self.ema, state["ema"], strict=True):
            average.copy_(distributed_like(saved, average))
        torch.set_rng_state(state["rng"])
        self.step = state["step"]


class TrainedNetwork:
    """A module with its AdamW, which does not decay norm gains and biases.

    `learning_rate` is the peak of its schedule.
    """

    def __init__(self, module: nn.Module, training: TrainingSection, learning_rate: float) -> None:
        self.module = module
        self.learning_rate = learning_rate
        self.clip = training.gradient_clip or math.inf
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in self.parameters if p.ndim > 1],
                "weight_decay": training.weight_decay,
            },
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=training.betas,
            fused=self.parameters[0].is_cuda or None,  # None: torch's own choice
        )

    def prepare(self, relative_rate: float) -> None:
        """Drop the last step's gradients and set the rate of this one."""
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * relative_rate

    def clip_gradients(self) -> Tensor:
        """The global gradient norm (0-dim) before clipping."""
        norm: Tensor = gathered(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer as gathered tensors; all workers of a sharded module call it."""
        return {
            "weights": gathered(self.module.state_dict()),
            "optimizer": gathered(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, distributed as the module is."""
        own = self.module.state_dict()
        weights = {
            name: distributed_like(value, own[name]) for name, value in state["weights"].items()
        }
        self.module.load_state_dict(weights)
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: {name: _copy_like(value, ordered[index]) for name, value in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        # Learning rates and decays are the recipe's: a resumed run may have others than before.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"param_groups": groups, "state": moments})


def ema_decay(step: int, decay: float) -> float:
    """The average's decay at optimizer step `step` (from 0): min(decay, (1 + step) / (10 + step)).

    This is TensorFlow's ExponentialMovingAverage with `num_updates`. A constant 0.9999 would leave
    the untrained weights a third of the average after ten thousand steps.
    """
    return min(decay, (1 + step) / (10 + step))


def _copy_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of one of AdamW's tensors where `parameter` is; of its step count, where it was."""
    # AdamW keeps what it is given, which would be the checkpoint's file, mapped into memory.
    if value.shape != parameter.shape:
        return value.clone()
    distributed = distributed_like(value, parameter)
    return distributed if distributed is not value else value.to(parameter.device, copy=True)


def write_content(content: dict[str, Any], path: Path) -> None:
    """Write what `TrainState.content` gave, tensor by tensor. Raises OSError where it cannot."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch fails once more while it closes the file; the first error says why.
            raise (error.__context__ or error) from None


def _verified(path: Path) -> dict[str, Any]:
    # torch.save writes a CRC-32 of each tensor, and torch.load does not check it.
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointDamaged(f"the checksum of {damaged} is wrong")
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, CheckpointDamaged):
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointDamaged(f"it is no checkpoint: {reason}") from None
    if not isinstance(state, dict) or not {"step", "networks", "ema", "rng"} <= state.keys():
        raise CheckpointDamaged("it is a file of another kind")
    return state
