"""Scaled dot-product attention by the kernel that is fastest on the tensors' device.

That is torch's fused kernel, except where a CPU trains on few tokens: there its backward pass takes
up to five times as long as that of the plain product (docs/benchmarks.md, attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST_PLAIN = {torch.float32: 128, torch.bfloat16: 256}
"""Most keys with which the plain product trains faster on a CPU, by dtype; measured."""

_always_fused = False


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, [B, heads, N, d], of queries [B, heads, N, d] and M keys.

    `mask` is bool, broadcasts to [B, heads, N, M] and is true where a query attends to a key.
    `causal`, for N = M and without a mask, lets a query attend to the keys up to its own position.
    """
    if not _plain_is_faster(q, k):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(-1, torch.float32).to(v.dtype) @ v


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    trains = torch.is_grad_enabled() and q.requires_grad
    on_cpu = q.device.type == "cpu" and not _always_fused
    return trains and on_cpu and k.shape[-2] <= LONGEST_PLAIN.get(q.dtype, 0)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside it `attention` is the fused kernel's on a CPU too: for the memory plan of a GPU."""
    global _always_fused
    before, _always_fused = _always_fused, True
    try:
        yield
    finally:
        _always_fused = before
