"""What decides whether two sets of tensors are the same: one hash of names, dtypes, shapes and contents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and contents in name order: the same for any file format and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()
