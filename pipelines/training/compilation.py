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
import time
from collections.abc import Iterable, Iterator
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
TRIAL_STEPS = 10
"""After so many compiled steps it decides again."""
WORTH_SECONDS = 1200.0
"""The time of steps that is worth compiling for: twenty minutes.

On an AMD EPYC with avx512_bf16, compiling cost 120 core-seconds for the MMDiT of emoji-dinov2s and
saved 27 % of a step; for its autoencoder 57 and 14 %. Both had paid after seven minutes. The pixel
decoder took 13 % longer compiled, which is why there is a trial (docs/benchmarks.md).
"""
GAIN = 0.05
"""The share of a step that compiling must save in the trial to stay."""
SHAPES = 256
"""So many shapes of a batch are compiled; torch runs further ones uncompiled, and warns.

Torch's own 8 would be used up by captions of 128 tokens, which have a length for every 16. Which
shapes are compiled would then depend on those that came first, and with them a resumed run's bits.
"""


class Compilation:
    """When the loop compiles `modules`, the network and the frozen ones beside it.

    `compile: true` does so before the first step. `auto` does so after FIRST_STEPS, if the steps to
    come would take more than WORTH_SECONDS, and goes back after TRIAL_STEPS, if they have not
    become faster by GAIN; the fastest step of each kind counts. Every shape is compiled by itself,
    so that the kernels do not depend on which shape came first. `retains_graph` says that the
    loss runs backward through the networks more than once.
    """

    def __init__(
        self,
        training: TrainingSection,
        run_uri: str,
        modules: Iterable[nn.Module],
        device: torch.device,
        is_first: bool,
        world_size: int,
        retains_graph: bool = False,
    ) -> None:
        self._steps, self._modules, self._device = training.steps, tuple(modules), device
        self._uri, self._is_first = paths.join(run_uri, RECORD), is_first
        self._world_size, self._is_compiled = world_size, False
        self._retains_graph = retains_graph
        self._plain: list[float] = []
        self._compiled: list[float] = []
        self._auto = training.compile == "auto"
        # Steps first_step to last_step - 1 are compiled; `decided` is false during the trial.
        self._record: dict[str, Any] = {"decided": not self._auto}
        if training.compile is True:
            self._record["first_step"] = 0
        elif self._auto and paths.exists(self._uri):
            self._record = json.loads(paths.read_bytes(self._uri))

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Optimizer step `step` (from 0) runs inside, compiled or not."""
        if not self._record["decided"]:
            self._decide(step)
        first, last = self._record.get("first_step"), self._record.get("last_step")
        compiled = first is not None and first <= step and (last is None or step < last)
        if compiled and not self._is_compiled:
            _set_compiler(self._retains_graph)
            for module in self._modules:
                module.compile(dynamic=False)
            self._is_compiled = True
        started = time.perf_counter()
        with contextlib.nullcontext() if compiled else self.paused():
            yield
        (self._compiled if compiled else self._plain).append(time.perf_counter() - started)

    def paused(self) -> contextlib.AbstractContextManager[Any]:
        """Inside it the networks run as they are: a validation has shapes of its own."""
        # Where nothing was compiled the compiler is not even imported.
        if not self._is_compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _decide(self, step: int) -> None:
        """Whether to compile, and after the trial whether that stays; rank 0 decides for all."""
        first = self._record.get("first_step")
        if first is None and step >= FIRST_STEPS and self._plain:
            record, said = self._before_compiling(step)
        elif first is not None and step >= first + TRIAL_STEPS:
            record, said = self._after_trial(step)
        else:
            return
        if self._world_size > 1:
            from ray.train.collective import broadcast_from_rank_zero

            record = broadcast_from_rank_zero(record)
        self._record = record
        if self._is_first:
            paths.write_bytes(self._uri, json.dumps(record, indent=1).encode())
            say(f"compile=auto: {said}")

    def _before_compiling(self, step: int) -> tuple[dict[str, Any], str]:
        fastest = min(self._plain)
        to_come = (self._steps - step) * fastest
        why = f"the steps to come take about {to_come:.0f} s (worth it: {WORTH_SECONDS:.0f} s)"
        if to_come > WORTH_SECONDS and _can_compile(self._device):
            record = {"decided": False, "first_step": step, "plain_seconds": fastest}
            return record, f"compiled from step {step} on; {why}"
        if to_come > WORTH_SECONDS:
            language = "C++" if self._device.type == "cpu" else "C"
            why = f"this machine has no {language} compiler with Python's headers"
        return {"decided": True}, f"not compiled; {why}"

    def _after_trial(self, step: int) -> tuple[dict[str, Any], str]:
        record = self._record | {"decided": True}
        if len(self._compiled) < 3:  # resumed just now: nothing speaks against it
            return record, "stays compiled"
        plain, compiled = record["plain_seconds"], min(self._compiled)
        record["compiled_seconds"] = compiled
        said = f"{compiled:.3g} s a step, {plain:.3g} before"
        if compiled < (1 - GAIN) * plain:
            return record, f"stays compiled; {said}"
        return record | {"last_step": step}, f"no longer compiled from step {step} on; {said}"


def _set_compiler(retains_graph: bool) -> None:
    """Allow SHAPES shapes, and where it is needed several backward passes of one graph."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = SHAPES
    if retains_graph:
        # Steps before it (losses.adversarial_start) compile backward passes that would overwrite
        # what the forward pass has kept.
        torch._functorch.config.donated_buffer = False


def _can_compile(device: torch.device) -> bool:
    """Whether torch finds the compiler that it needs: for a CPU C++, for a GPU Triton's C."""
    on_cpu = device.type == "cpu"
    variable, usual, other = ("CXX", "g++", "clang++") if on_cpu else ("CC", "gcc", "clang")
    compiler = shutil.which(os.environ.get(variable, usual)) or shutil.which(other)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return compiler is not None and headers.is_file()
