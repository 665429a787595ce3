"""`precision: auto` follows the device, and a job keeps what it began with."""

from __future__ import annotations

import pytest
import torch

from fae_core.precision import autocast, settled_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_a_cpu_takes_bf16_where_it_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert settled_precision("auto") == expected
    assert settled_precision("auto", gpus=0.5) == "bf16"
    assert settled_precision("auto", before="fp32") == "fp32"
    assert settled_precision("auto", before="bf16") == "bf16"
    assert settled_precision("auto", before="auto") == expected
    for asked in ("fp32", "bf16"):
        assert settled_precision(asked, gpus=1.0, before="bf16") == asked


def test_autocast_follows_the_precision_that_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    for precision, dtype in (("auto", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(precision, cpu):
            assert (x @ x).dtype == dtype
