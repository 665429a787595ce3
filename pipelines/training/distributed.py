"""FSDP: a model's parameters split over the workers by torch's `fully_shard`.

A checkpoint holds whole tensors, or the rows that each worker has or would have (`rows_of`). A run
may therefore resume on another number of workers, sharded or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

SMALL = 64 << 10
"""Bytes of a tensor that every part of a checkpoint holds whole, unless it is distributed."""


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


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value`, in any nesting of dicts and lists, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(change, item) for item in value)
    return value


def gathered(value: Any) -> Any:
    """`value`, in any nesting of dicts and lists, with every distributed tensor gathered.

    All workers must call it together.
    """
    return mapped(lambda tensor: part_of(tensor, 0, 1), value)


def rows_of(length: int, part: int, parts: int) -> range:
    """The rows of a tensor's first dimension that one of `parts` has: as torch.chunk divides them,
    and `fully_shard` with it."""
    each = -(-length // parts)
    return range(min(part * each, length), min((part + 1) * each, length))


def part_of(tensor: Tensor, part: int, parts: int) -> Tensor:
    """What part number `part` of `parts` holds of `tensor`: its rows, of a small tensor all.

    The only part holds the whole tensor, for which all workers must call it together. Of a
    distributed tensor with several parts, `part` must be this worker.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor() if parts == 1 else tensor.to_local()
    if parts == 1 or tensor.nbytes <= SMALL:
        return tensor
    rows = rows_of(len(tensor), part, parts)
    return tensor[rows.start : rows.stop]


def needs(tensor: Tensor, part: int, parts: int) -> bool:
    """Whether this worker fills rows of `tensor` from that part; small tensors are in any part."""
    if not isinstance(tensor, DTensor) and tensor.nbytes <= SMALL:
        return False
    return bool(_common(_own_rows(tensor), rows_of(len(tensor), part, parts)))


def fill(tensor: Tensor, saved: Tensor, part: int, parts: int) -> None:
    """Copy into the whole or distributed `tensor` what `saved` has of it: what `part_of` gave.

    Raises ValueError where `saved` has another shape.
    """
    if tensor.ndim == 0 and saved.ndim == 0:
        tensor.copy_(saved)
        return
    there = range(len(tensor)) if saved.shape == tensor.shape else rows_of(len(tensor), part, parts)
    if saved.shape != (len(there), *tensor.shape[1:]):
        raise ValueError(f"a tensor {list(tensor.shape)} has {list(saved.shape)} there")
    here = _own_rows(tensor)
    rows = _common(here, there)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local[rows.start - here.start : rows.stop - here.start].copy_(
        saved[rows.start - there.start : rows.stop - there.start]
    )


def _own_rows(tensor: Tensor) -> range:
    if not isinstance(tensor, DTensor):
        return range(len(tensor))
    mesh = tensor.device_mesh
    return rows_of(len(tensor), mesh.get_local_rank(), mesh.size())


def _common(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))
