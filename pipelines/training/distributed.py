"""FSDP: a model's parameters split over the workers (torch's `fully_shard`), and tensors brought together and apart again.

A checkpoint holds whole tensors, so a run may go on with another number of workers, sharded or not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module) -> None:
    """Split `model` in place over all workers: every layer of its module lists on its own, then the rest.

    Parameters are gathered and gradients reduced in float32, and autocast does what it does to a whole model: numbers
    differ from DDP's by the order of sums alone, so a run may change from one to the other.
    """
    layers = [
        layer for group in model.modules() if isinstance(group, nn.ModuleList) for layer in group
    ]
    for layer in reversed(layers):  # the innermost first, as torch asks
        fully_shard(layer)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(model, FSDPModule)


def gathered(value: Any) -> Any:
    """`value` with every split tensor gathered, in any nesting of dicts and lists. All workers must call it together."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def distributed_like(value: Tensor, model: Tensor) -> Tensor:
    """`value` [whole] split as `model` is; itself where `model` is not split or has another shape (Adam's step count)."""
    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
