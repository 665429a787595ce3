"""A content hash of named tensors, by which weights are identified in fingerprints and checkpoints.

This module imports nothing of `fae_core`, so that the frozen backbone can use it without importing
checkpoints and generators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and contents in the order of the names.

    It does not depend on the file format or the device of the tensors.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
