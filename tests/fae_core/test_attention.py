"""The plain product that CPUs train with is torch's fused attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fae_core import attention as module
from fae_core.attention import attention, fused_attention


def tensors(length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values [2, 3, length, 16] that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, length, 16)
    made = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_values_and_gradients_are_those_of_the_fused_kernel(kind: str) -> None:
    mask = None
    if kind == "mask":
        mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
        mask[1, ..., 7:] = False
    ours, theirs = tensors(20), tensors(20)
    made = attention(*ours, mask=mask, causal=kind == "causal")
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=kind == "causal")
    torch.testing.assert_close(made, expected)
    gradient = torch.randn_like(made)
    made.backward(gradient)
    expected.backward(gradient)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_plain_product_is_taken_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        module.F, "scaled_dot_product_attention",
        lambda *a, **k: fused.append(True) or kernel(*a, **k),
    )  # fmt: skip

    def is_fused(length: int, dtype: torch.dtype) -> bool:
        fused.clear()
        attention(*tensors(length, dtype))
        return bool(fused)

    assert not is_fused(128, torch.float32) and is_fused(129, torch.float32)
    assert not is_fused(256, torch.bfloat16) and is_fused(257, torch.bfloat16)
    with torch.no_grad():
        assert is_fused(64, torch.float32)
    with fused_attention():
        assert is_fused(64, torch.float32)
    assert not is_fused(64, torch.float32)


def test_it_compiles_to_the_same_values() -> None:
    ours = tensors(20)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*ours), attention(*ours))
