"""What a checkpoint holds: networks with their optimizers, moving average, step and RNG.

The loop trains a `TrainState`; checkpoints.py writes it to one file, or to a part for each worker,
and reads it back. One file is the only part of one, so that there is one way to read both.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config.sections import TrainingSection
from .distributed import fill, gathered, is_sharded, mapped, needs, part_of
from .job import Adversary, TrainingError


class CheckpointDamaged(TrainingError):
    """Bytes that are not those of a checkpoint as it was written."""


Moments = dict[int, dict[str, Tensor]]
"""AdamW's tensors by the parameter's number in its groups, and by name."""


class TrainState:
    """Model and adversary with their optimizers, the model's moving average, and the step."""

    def __init__(
        self, model: nn.Module, training: TrainingSection, adversary: Adversary | None = None
    ) -> None:
        self.model = model
        self.adversary = adversary
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

    def content(self, part: int = 0, parts: int = 1, copy: bool = False) -> dict[str, Any]:
        """What part number `part` of `parts` of a checkpoint holds.

        The tensors are those of the state itself, or with `copy` copies on the host. All workers of
        a sharded model must call it together, each for its own part or all for the only one.
        """

        def held(tensor: Tensor) -> Tensor:
            rows = part_of(tensor.detach(), part, parts)
            return rows.to("cpu", copy=True) if copy else rows

        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return {
            "step": self.step,
            "part": part,
            "parts": parts,
            "networks": mapped(held, networks),
            "ema": mapped(held, self.ema),
            "rng": torch.get_rng_state(),
        }

    def needs(self, part: int, parts: int) -> bool:
        """Whether this worker must read that part, besides any one.

        A whole model has rows of every part, also of small tensors if a sharded one wrote it.
        """
        if not is_sharded(self.model):
            return True
        modules = [network.module for network in self.networks.values()]
        tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()))
        return any(needs(tensor, part, parts) for tensor in tensors)

    @torch.no_grad()
    def load(self, files: Iterable[Path]) -> None:
        """Take over the parts of a checkpoint, all that this worker `needs`, without unpickling
        code. Of the RNG's states the last one counts.

        A file is mapped into memory, not read as a whole. Raises CheckpointDamaged, after which the
        state is unusable until another checkpoint was loaded.
        """
        moments: dict[str, Moments] = {name: {} for name in self.networks}
        try:
            for file in files:
                self._fill(_verified(file), moments)
        except (KeyError, ValueError) as error:
            raise CheckpointDamaged(f"it is of another network: {error}") from None
        for name, network in self.networks.items():
            network.take_moments(moments[name])

    def _fill(self, saved: dict[str, Any], moments: dict[str, Moments]) -> None:
        part, parts = saved.get("part", 0), saved.get("parts", 1)
        for name, network in self.networks.items():
            network.fill(saved["networks"][name], moments[name], part, parts)
        for average, rows in zip(self.ema, saved["ema"], strict=True):
            fill(average, rows, part, parts)
        torch.set_rng_state(saved["rng"])
        self.step = saved["step"]


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
        """Weights and optimizer, distributed as the module is."""
        return {"weights": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def fill(self, saved: dict[str, Any], moments: Moments, part: int, parts: int) -> None:
        """Take over a part's weights, and collect AdamW's tensors in `moments`.

        Raises KeyError or ValueError where the part is of another network.
        """
        if moments and moments.keys() != saved["optimizer"]["state"].keys():
            raise ValueError("its parts differ in what the optimizer has")
        own = self.module.state_dict()
        for name in own.keys() | saved["weights"].keys():
            fill(own[name], saved["weights"][name], part, parts)
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in saved["optimizer"]["state"].items():
            kept = moments.setdefault(index, {})
            for name, value in values.items():
                if value.ndim == 0:
                    # AdamW keeps what it is given, which would be the file, mapped into memory.
                    kept[name] = value.clone()
                    continue
                if name not in kept:
                    kept[name] = torch.empty_like(ordered[index])
                fill(kept[name], value, part, parts)

    def take_moments(self, moments: Moments) -> None:
        """Give AdamW the tensors of all parts."""
        # Learning rates and decays are the recipe's: a resumed run may have others than before.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"param_groups": groups, "state": moments})


def ema_decay(step: int, decay: float) -> float:
    """The average's decay at optimizer step `step` (from 0): min(decay, (1 + step) / (10 + step)).

    This is TensorFlow's ExponentialMovingAverage with `num_updates`. A constant 0.9999 would leave
    the untrained weights a third of the average after ten thousand steps.
    """
    return min(decay, (1 + step) / (10 + step))


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
    named = f"{path.name}: " if path.suffix == ".part" else ""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointDamaged(f"{named}the checksum of {damaged} is wrong")
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, CheckpointDamaged):
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointDamaged(f"{named}it is no checkpoint: {reason}") from None
    if not isinstance(state, dict) or not {"step", "networks", "ema", "rng"} <= state.keys():
        raise CheckpointDamaged(f"{named}it is a file of another kind")
    return state
