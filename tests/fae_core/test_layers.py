"""fae_core/layers.py: the norm that autocast leaves alone."""

import warnings

import pytest
import torch

from fae_core.layers import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_is_its_definition_and_keeps_the_type(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (5 * torch.randn(3, 7, 64, generator=generator)).to(dtype)
    norm = RMSNorm(64, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64, generator=generator) + 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where its fused kernel does not apply
        found = norm(x)
    assert found.dtype == dtype
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(
        found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
