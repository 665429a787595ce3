"""Peak memory of a network's forward pass: bytes of the results that are alive at once.

The estimates of precompute and sampling (memory.py) measure on fake tensors, which hold nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of(run: Callable[[int], Any], num_images: int) -> int:
    """Bytes at the peak of `run(num_images)`, extrapolated from one image and two."""
    peaks = []
    for number in (1, 2):
        with torch.inference_mode(), Results() as results:
            run(number)
        peaks.append(results.peak)
    return peaks[0] + (num_images - 1) * (peaks[1] - peaks[0])


class Results(TorchDispatchMode):
    """Inside it, `now` is what the operations' results hold, and `peak` the most that they did."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.alive:
            return
        self.alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size
