"""FSDP: a model's parameters split over the workers by torch's `fully_shard`.

Distributed tensors are gathered for checkpoints and validation, and whole ones are distributed
again when a run resumes. A run may therefore resume on another number of workers, sharded or not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module) -> None:
    """Distribute `model` in place over all workers: each layer of its module lists, then the rest.

    Parameters are gathered and gradients reduced in float32, and autocast acts as on a whole model.
    Results therefore differ from DDP's by the order of sums alone, and a run may change between
    the two.
    """
    layers = [
        layer for group in model.modules() if isinstance(group, nn.ModuleList) for layer in group
    ]
    for layer in reversed(layers):  # the innermost first, as torch asks
        fully_shard(layer)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of `model` are distributed."""
    return isinstance(model, FSDPModule)


def gathered(value: Any) -> Any:
    """`value`, in any nesting of dicts and lists, with every distributed tensor gathered.

    All workers must call it together.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def distributed_like(value: Tensor, model: Tensor) -> Tensor:
    """The gathered tensor `value`, distributed as `model` is.

    `value` itself where `model` is not distributed or has another shape, as Adam's step count has.
    """
    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
