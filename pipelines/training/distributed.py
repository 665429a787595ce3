"""FSDP: a model's parameters split over the workers by torch's `fully_shard`.

A checkpoint holds whole tensors, or the rows that each worker has or would have (`rows_of`). A run
may therefore resume on another number of workers, sharded or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

SMALL = 64 << 10
"""Bytes of a tensor that every part of a checkpoint holds whole, unless it is distributed."""


def shard(model: nn.Module) -> None:
    """Distribute `model` in place over all workers: each layer of its module lists, then the rest.

    Parameters are gathered and gradients reduced in float32, and autocast acts as on a whole model.
    Results therefore differ from DDP's by the order of sums alone, and a run may change between
    the two. In bf16 the backward pass needs the cast weights of all layers, which each worker
    keeps: half of the network's bytes, but for layers whose activations are computed again.
    """
    for layer in _layers(model):
        fully_shard(layer)
    fully_shard(model)


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of whole weights and gradients that a worker holds at once of a sharded `model`.

    They are those outside of its layers, and those of two layers: the next one is gathered ahead.
    """
    sizes, counted = [], set()
    for group in (*_layers(model), model):
        own = [p for p in group.parameters() if p not in counted]
        counted.update(own)
        sizes.append(sum(p.nbytes for p in own))
    *layers, others = sizes
    return 2 * (others + sum(sorted(layers)[-2:]))


def _layers(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself, the innermost first, as torch asks."""
    groups = [group for group in model.modules() if isinstance(group, nn.ModuleList)]
    return [layer for group in groups for layer in group][::-1]


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


@torch.no_grad()
def gather(model: nn.Module, whole: nn.Module) -> None:
    """Copy what a sharded `model` holds into `whole`, on a worker where that is another module.

    All workers must call it together. They hold one whole tensor at a time.
    """
    wanted = {} if whole is model else whole.state_dict()
    for name, tensor in model.state_dict().items():
        full = part_of(tensor, 0, 1)
        if wanted:
            wanted[name].copy_(full)
        del full


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
    """Whether a sharded model's worker fills rows of `tensor` from that part.

    Small tensors that are not distributed are in any part.
    """
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
