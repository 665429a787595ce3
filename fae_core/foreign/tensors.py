"""The tensors of others' checkpoints: safetensors, or PyTorch files that are not unpickled.

A training checkpoint holds the network more than once; its moving average is what its authors
sample from, so that is taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fae_core.errors import UserError

WRAPPERS = ("ema", "model", "state_dict")
"""Keys under which a training checkpoint keeps a network, the first that is there being taken."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names of tensors."""


class ForeignError(UserError, ValueError):
    """A checkpoint that is not what was named, or that no module here can hold."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The network's tensors in the file `path`, by their names without prefixes, on the CPU.

    A name that ends with .safetensors is read as such, any other as what `torch.save` writes, with
    weights_only=True. Raises ForeignError.
    """
    try:
        if str(path).endswith(".safetensors"):
            found: Any = load_file(str(path))
        else:
            # SiT's training keeps its arguments beside the weights. A Namespace only takes values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file it is whatever its bytes lead to
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ForeignError(
            f"{path} cannot be read as a file of tensors; Python objects in it are not executed "
            f"({line}). Save its state_dict alone with torch.save, or as safetensors."
        ) from None
    while isinstance(found, Mapping) and (wrapper := _wrapper(found)) is not None:
        found = found[wrapper]
    if not isinstance(found, Mapping):
        raise ForeignError(f"{path} holds a {type(found).__name__}, not tensors by name.")
    tensors = {_plain(str(name)): t for name, t in found.items() if isinstance(t, Tensor)}
    if not tensors:
        raise ForeignError(f"{path} holds no tensors.")
    return tensors


def _wrapper(found: Mapping[str, Any]) -> str | None:
    return next((name for name in WRAPPERS if isinstance(found.get(name), Mapping)), None)


def _plain(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


class Remaining:
    """The tensors that no one has taken yet; in the end there must be none."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.tensors = dict(tensors)
        self.source = source

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        """The tensor, float32. Raises ForeignError where there is none of this name."""
        if name not in self.tensors:
            raise ForeignError(f"{self.source}: there is no tensor {name}.")
        return self.tensors.pop(name).float()

    def affine(self, name: str, to: str) -> dict[str, Tensor]:
        """Weight and bias of the layer `name`, under the name `to`."""
        return {f"{to}.{part}": self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def count(self, prefix: str) -> int:
        """How many layers PREFIX.0., PREFIX.1., … there are."""
        starts = {
            name.removeprefix(prefix).split(".")[0]
            for name in self.tensors
            if name.startswith(prefix)
        }
        return len(starts)

    def finish(self) -> None:
        """Raises ForeignError where tensors are left that mean something else than was read."""
        if self.tensors:
            names = sorted(self.tensors)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ForeignError(
                f"{self.source} has tensors that are not understood, so its outputs would differ: "
                f"{', '.join(names[:4])}{more}."
            )
