"""Whether a training compiles its networks: `compile: auto` decides by the time of its first steps.

The loop asks a `Compilation` before every step. What `auto` has decided is in the run's folder, so
a resumed run computes with the kernels that it began with, and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.sections import TrainingSection
from ..storage import paths
from .run_log import say

RECORD = "compile.json"
FIRST_STEPS = 5
"""After so many steps of a run `auto` decides."""
WORTH_SECONDS = 600.0
"""The time of steps that is worth compiling for.

On two cores of an AMD EPYC with avx512_bf16, compiling cost 120 core-seconds for the MMDiT of
emoji-dinov2s and 57 for its autoencoder, and saved 27 % and 13 % of a step: it paid after 440
seconds of steps for both (docs/benchmarks.md).
"""


class Compilation:
    """When the loop compiles `modules`, the network and the frozen ones beside it.

    `compile: true` does so before the first step. `auto` does so after FIRST_STEPS, if the steps to
    come would take more than WORTH_SECONDS, each as long as the fastest so far. Every shape is
    compiled by itself, so that the kernels do not depend on which shape came first.
    """

    def __init__(
        self,
        training: TrainingSection,
        run_uri: str,
        modules: Iterable[nn.Module],
        device: torch.device,
        is_first: bool,
        world_size: int,
    ) -> None:
        self._steps, self._modules, self._device = training.steps, tuple(modules), device
        self._uri, self._is_first = paths.join(run_uri, RECORD), is_first
        self._world_size = world_size
        self._fastest: float | None = None
        self._first_step: int | None = 0 if training.compile is True else None
        self._undecided = training.compile == "auto"
        if self._undecided and paths.exists(self._uri):
            self._take(json.loads(paths.read_bytes(self._uri)))

    def before(self, step: int) -> None:
        """Compile where optimizer step `step` (from 0) is to be the first compiled one."""
        if self._undecided and step >= FIRST_STEPS and self._fastest is not None:
            self._decide(step)
        if self._modules and self._first_step is not None and step >= self._first_step:
            for module in self._modules:
                module.compile(dynamic=False)
            self._modules = ()

    def timed(self, seconds: float) -> None:
        """Note how long the last step took."""
        self._fastest = min(seconds, self._fastest or seconds)

    def _decide(self, step: int) -> None:
        """Rank 0 decides for all workers, and writes it down."""
        to_come = (self._steps - step) * (self._fastest or 0.0)
        record: dict[str, Any] = {"first_compiled_step": None, "seconds_to_come": round(to_come, 1)}
        why = f"the steps to come take about {to_come:.0f} s"
        if to_come > WORTH_SECONDS and not _can_compile(self._device):
            why = "this machine has no C++ compiler with Python's headers"
        elif to_come > WORTH_SECONDS:
            record["first_compiled_step"] = step
        if self._world_size > 1:
            from ray.train.collective import broadcast_from_rank_zero

            record = broadcast_from_rank_zero(record)
        self._take(record)
        if self._is_first:
            paths.write_bytes(self._uri, json.dumps(record, indent=1).encode())
            does = "not compiled" if self._first_step is None else f"compiled from step {step} on"
            say(f"compile=auto: {does}; {why}, and it is worth it from {WORTH_SECONDS:.0f} s on")

    def _take(self, record: dict[str, Any]) -> None:
        self._first_step, self._undecided = record["first_compiled_step"], False


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Inside it compiled networks run as they are: a validation has shapes of its own."""
    return torch.compiler.set_stance("force_eager")


def _can_compile(device: torch.device) -> bool:
    """Whether torch finds what it needs for kernels of a CPU."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return device.type != "cpu" or (compiler is not None and headers.is_file())
