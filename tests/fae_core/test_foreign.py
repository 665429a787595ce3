"""SiT's and LightningDiT's networks, written down by the names of their tensors, against DiT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fae_core.foreign.dit import dit_generator
from fae_core.foreign.tensors import ForeignError, read_tensors
from fae_core.samplers import sample_ode
from tests.foreign_networks import (
    CHANNELS,
    CLASSES,
    HEADS,
    SIDE,
    WIDTH,
    Tensors,
    random_tensors,
    theirs,
)

VARIANTS = {
    "LightningDiT-XL/1": {},
    "LightningDiT with patches of 2": {"patch": 2},
    "LightningDiT with normalized queries": {"qk_norm": True},
    "LightningDiT without shifts": {"shift": False},
    "SiT": {"modern": False, "patch": 2},
    "SiT with variances, as published": {"modern": False, "patch": 2, "variances": True},
    "no null class": {"null_class": False},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_an_imported_generator_computes_the_same(variant: dict) -> None:
    tensors, patch = random_tensors(**variant), variant.get("patch", 1)
    ours = dit_generator(tensors, "it", HEADS, CLASSES)
    x, t = torch.randn(4, CHANNELS, SIDE, SIDE), torch.tensor([0.0, 0.3, 0.75, 1.0])
    y = torch.tensor([0, 1, 2, CLASSES if variant.get("null_class", True) else 3])
    with torch.no_grad():
        expected = -theirs(tensors, x, 1 - t, y, patch)
        assert expected.std() > 0.1
        assert (ours(x, t, y) - expected).abs().max() < 1e-4


def test_both_walk_from_the_same_noise_to_the_same_latents() -> None:
    tensors = random_tensors()
    ours = dit_generator(tensors, "it", HEADS, CLASSES)
    noise, y = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([0, 4])
    x, steps = noise, 20
    with torch.no_grad():
        for step in range(steps):
            x = x + theirs(tensors, x, torch.full((2,), step / steps), y) / steps
        assert (sample_ode(ours, noise, y, steps) - x).abs().max() < 1e-4


def test_heads_and_classes_are_read_off_where_the_tensors_tell_them() -> None:
    config = dit_generator(random_tensors(), "it").config
    assert (config.num_heads, config.num_classes, config.label_dropout) == (HEADS, CLASSES, 0.1)
    config = dit_generator(random_tensors(null_class=False), "it", num_classes=CLASSES).config
    assert (config.num_classes, config.label_dropout) == (CLASSES, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projectors.0.weight": torch.zeros(2, 2)}, "not understood.*projectors.0.weight"),
        ({"feat_rope.freqs_cos": torch.zeros(16, 12)}, "rotary positions of another kind"),
        ({"blocks.0.attn.q_norm.bias": torch.zeros(12)}, "LayerNorm"),
        ({"final_layer.linear.bias": torch.zeros(7)}, "predicts 7 values"),
        ({"y_embedder.embedding_table.weight": torch.zeros(9, WIDTH)}, "9 label embeddings"),
        ({"blocks.1.mlp.w12.bias": torch.zeros(7)}, "does not fit"),
    ],
)
def test_what_no_dit_holds_is_refused_in_words(change: Tensors, message: str) -> None:
    with pytest.raises(ForeignError, match=message):
        dit_generator(random_tensors() | change, "it", HEADS, CLASSES)


def test_a_width_of_no_known_size_needs_the_heads() -> None:
    with pytest.raises(ForeignError, match="--num-heads"):
        dit_generator(random_tensors(modern=False), "it", num_classes=CLASSES)


def test_an_empty_or_damaged_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    for name in ("empty.pt", "empty.safetensors", "damaged.pt"):
        (tmp_path / name).write_bytes(b"junk" if name == "damaged.pt" else b"")
        with pytest.raises(ForeignError, match=rf"{name} cannot be read as a file of tensors"):
            read_tensors(tmp_path / name)
