"""What a training step holds in memory: by network, and by image of the micro-batch.

Adversarial training needs most of its memory only once the adversary starts, hours into a run. The
plan therefore measures the last step, with every loss on. The loop prints it before the first step,
and requirements.py makes it of networks that were never allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fae_core.precision import autocast

from ..config.sections import TrainingSection
from ..networks.untrained import network_bytes, tensors_of
from .batches import Batch
from .job import Job

MEBI = 1 << 20
ADAM_COPIES = 2
NORMS = (torch.ops.aten.native_group_norm.default, torch.ops.aten.native_layer_norm.default)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker whose micro-batch holds `num_images` images."""

    parts: dict[str, int]
    """Of the networks, by name."""
    fixed: int
    """Kept for the backward pass whatever the number of images."""
    per_image: int
    """Kept for the backward pass of each image."""
    num_images: int

    @property
    def kept(self) -> int:
        """What the whole micro-batch keeps for the backward pass."""
        return self.fixed + self.per_image * self.num_images

    @property
    def total(self) -> int:
        """Everything together; temporary results inside a layer come on top."""
        return sum(self.parts.values()) + self.kept

    def text(self, device: torch.device) -> str:
        """A table for people, with a warning where the plan exceeds the memory of a GPU."""
        rows = [(name, f"{size / MEBI:,.0f}") for name, size in self.parts.items()]
        rows.append(("kept for the backward pass", f"{self.kept / MEBI:,.0f}"))
        rows.append(("together", f"{self.total / MEBI:,.0f}"))
        width = max(len(name) for name, _ in rows)
        lines = [
            f"memory plan of a worker [MiB], everything on, {self.num_images} images "
            f"a micro-batch, {self.per_image / MEBI:.1f} each",
            *(f"  {name:<{width}}  {size:>9}" for name, size in rows),
        ]
        if device.type == "cuda":
            there = torch.cuda.get_device_properties(device).total_memory
            lines.append(f"  {'on this device':<{width}}  {there / MEBI:>9,.0f}")
            if self.total > there:
                lines.append(
                    "  This will not fit. "
                    "Raise training.accumulation, or set checkpoint_activations."
                )
        return "\n".join(lines)


def memory_plan_of(job: Job, training: TrainingSection, batch: Batch) -> MemoryPlan:
    """The plan of the job's last step on micro-batches like `batch`. Not of a sharded model."""
    adversary = job.adversary

    def forward(some: Batch) -> Any:
        some = replace(some, step=training.steps - 1)
        with autocast(training.precision, some.device):
            terms = job.loss(job.model, some)
            return terms, adversary.loss(adversary.module, some) if adversary else None

    trained = {"model": job.model} | ({"adversary": adversary.module} if adversary else {})
    return plan_memory(trained, job.frozen, training.ema_decay is not None, forward, batch)


def plan_memory(
    trained: Mapping[str, nn.Module],
    frozen: Mapping[str, nn.Module],
    has_average: bool,
    forward: Callable[[Batch], Any],
    batch: Batch,
) -> MemoryPlan:
    """The plan of a step whose forward passes are `forward(batch)`.

    `trained` networks cost weights, gradients, AdamW's two moments and, where `has_average`, the
    first of them a moving average; `frozen` ones cost their weights. `forward` runs for the first
    image of the batch and for the first two, on torch's fake tensors: these have the shape, dtype
    and device of real ones and no memory, so nothing is computed and no buffer changes.
    """
    parts = {}
    for index, (name, module) in enumerate(trained.items()):
        weights = network_bytes(module)
        learned = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        averages = has_average and index == 0
        kept = (ADAM_COPIES + averages) * learned
        parts[f"{name}: weights"] = weights
        parts[f"{name}: gradients, optimizer{', average' if averages else ''}"] = learned + kept
    for name, module in frozen.items():
        parts[f"{name}: weights (frozen)"] = network_bytes(module)
    networks = [*trained.values(), *frozen.values()]
    known = [tensor for module in networks for tensor in tensors_of(module)]
    num_images = len(batch.samples)
    with detect_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True) as mode, _ExactNorms():
        # What stands for a real weight inside the mode is no more kept than the weight itself.
        known += [mode.from_tensor(t) for t in known if not isinstance(t, FakeTensor)]
        one = kept_for_backward(lambda: forward(_first(batch, 1)), known)
        if num_images == 1:
            return MemoryPlan(parts, 0, one, 1)
        two = kept_for_backward(lambda: forward(_first(batch, 2)), known)
    return MemoryPlan(parts, max(0, 2 * one - two), two - one, num_images)


def checkpoint_bytes(trained: Iterable[nn.Module], has_average: bool) -> int:
    """What a checkpoint holds of the networks: weights, AdamW's moments, the first one's average.

    The file is larger by some kilobytes.
    """
    total = 0
    for index, module in enumerate(trained):
        learned = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        total += network_bytes(module) + (ADAM_COPIES + (has_average and index == 0)) * learned
    return total


def kept_for_backward(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between `forward()` and its backward pass, without `known`."""
    counted = {tensor.untyped_storage()._cdata for tensor in known}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        memory = tensor.untyped_storage()
        if memory._cdata not in counted:
            counted.add(memory._cdata)
            total += memory.nbytes()
        return tensor

    # While the result lives, so does what was kept: no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _result = forward()
    return total


class _ExactNorms(TorchDispatchMode):
    """Keeps the statistics of norms in float32, as the real kernels do; torch's fake ones round."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function not in NORMS:
            return result
        return (result[0], *(statistic.float() for statistic in result[1:]))


def _first(batch: Batch, num: int) -> Batch:
    tensors = {name: tensor[:num].clone() for name, tensor in batch.tensors.items()}
    return replace(batch, tensors=tensors, samples=batch.samples[:num], keys=batch.keys[:num])
