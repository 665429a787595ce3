"""The content hash of tensors, which stores and checkpoints of earlier versions hold."""

from __future__ import annotations

import torch

from fae_core.hashing import tensors_sha256


def test_the_hash_of_tensors_stays_what_it_was() -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor(3),
        "c": torch.tensor([True, False]),
        "d": torch.arange(4).half().reshape(2, 2).T,
        "e": torch.zeros(0, 3),
    }
    expected = "553f37906606321c5ac37588247e19f7d938391dcc4d15d0fbed4f7671652ce2"
    assert tensors_sha256(tensors) == expected


def test_bfloat16_has_a_hash_of_its_own() -> None:
    ones = torch.ones(3, dtype=torch.bfloat16)
    assert tensors_sha256({"a": ones}) == tensors_sha256({"a": ones.clone()})
    others = (ones.half(), ones * 2, ones.view(torch.int16))
    assert tensors_sha256({"a": ones}) not in {tensors_sha256({"a": other}) for other in others}
