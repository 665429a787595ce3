"""What a training step will hold in memory, said before the first step: by network, and by image of the micro-batch.

Adversarial training needs most of its memory only once the adversary starts, hours into a run; the plan counts the
step with everything on, so that what does not fit is known at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config.sections import TrainingSection
from .batches import Batch
from .job import Job


def memory_plan_of(job: Job, training: TrainingSection, batch: Batch) -> MemoryPlan:
    """What the run's last step, with everything on, holds in memory. Not of a sharded model."""
    adversary = job.adversary

    def forward(some: Batch) -> Any:
        bf16 = training.precision == "bf16"
        with torch.autocast(some.device.type, torch.bfloat16, enabled=bf16):
            terms = job.loss(job.model, replace(some, step=training.steps - 1))
            if adversary is None:
                return terms
            return terms, adversary.loss(adversary.module, replace(some, step=training.steps - 1))

    trained = {"model": job.model} | ({"adversary": adversary.module} if adversary else {})
    has_average = training.ema_decay is not None
    return plan_memory(trained, job.frozen, has_average, forward, batch)


MEBI = 1 << 20
ADAM_COPIES = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker: `parts` by name, `fixed` and `per_image` kept for the backward pass of `num_images`."""

    parts: dict[str, int]
    fixed: int
    per_image: int
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
        """A table for people; on a GPU with a warning where the plan is larger than its memory."""
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
                    "  This will not fit. Raise training.accumulation, or set checkpoint_activations."
                )
        return "\n".join(lines)


def plan_memory(
    trained: Mapping[str, nn.Module],
    frozen: Mapping[str, nn.Module],
    has_average: bool,
    forward: Callable[[Batch], Any],
    batch: Batch,
) -> MemoryPlan:
    """The plan of a step whose forward passes are `forward(batch)`; runs it on the batch's first one and two images.

    `trained` networks cost weights, gradients, AdamW's two moments and, the first of them, a moving average where
    `has_average`; `frozen` ones their weights. Buffers that `forward` changes are put back.
    """
    parts = {}
    for index, (name, module) in enumerate(trained.items()):
        learned = _bytes(p for p in module.parameters() if p.requires_grad)
        copies = 1 + ADAM_COPIES + (1 if has_average and index == 0 else 0)
        parts[f"{name}: weights"] = _bytes([*module.parameters(), *module.buffers()])
        parts[f"{name}: gradients, optimizer{', average' if copies > 3 else ''}"] = copies * learned
    for name, module in frozen.items():
        parts[f"{name}: weights (frozen)"] = _bytes([*module.parameters(), *module.buffers()])
    networks = [*trained.values(), *frozen.values()]
    buffers = [buffer for module in networks for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    known = [p for module in networks for p in (*module.parameters(), *module.buffers())]
    num_images = len(batch.samples)
    one = kept_for_backward(lambda: forward(_first(batch, 1)), known)
    two = kept_for_backward(lambda: forward(_first(batch, 2)), known) if num_images > 1 else one
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    if num_images == 1:
        return MemoryPlan(parts, 0, one, 1)
    return MemoryPlan(parts, max(0, 2 * one - two), two - one, num_images)


def kept_for_backward(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of `forward()`, without the tensors `known`."""
    counted = {tensor.untyped_storage().data_ptr() for tensor in known}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in counted:
            counted.add(memory.data_ptr())
            total += memory.nbytes()
        return tensor

    # While the result lives, so does what was kept: no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _result = forward()
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _first(batch: Batch, num: int) -> Batch:
    tensors = {name: tensor[:num].clone() for name, tensor in batch.tensors.items()}
    return replace(batch, tensors=tensors, samples=batch.samples[:num], keys=batch.keys[:num])
