"""The diffusion transformer against published parameter counts and its own promises."""

from __future__ import annotations

import pytest
import torch

from fae_core.generators.dit import DiT, DiTConfig, drop_labels
from fae_core.layers import num_parameters

TINY = DiTConfig(4, (8, 6), width=32, depth=2, num_heads=2, num_classes=3)


def on_meta(config: DiTConfig) -> int:
    with torch.device("meta"):
        return num_parameters(DiT(config))


def test_lightningdit_xl_at_32_channels_has_the_papers_675_26_million_parameters() -> None:
    assert round(on_meta(DiTConfig.preset("XL", 32, (16, 16))) / 1e6, 2) == 675.26


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sit_sizes_are_the_published_ones(size: str, millions: int) -> None:
    # SiT/2 on SD-VAE's 32 x 32 x 4, table 1 of arXiv 2212.09748 (which predicts twice the
    # channels).
    config = DiTConfig.preset(
        size, 4, (32, 32), patch_size=2, mlp="gelu", norm="layernorm", rope=False
    )
    assert on_meta(config) / 1e6 == pytest.approx(millions, abs=0.75)


def test_an_untrained_model_predicts_zero() -> None:
    output = DiT(TINY)(torch.randn(2, 4, 8, 6), torch.rand(2), torch.tensor([0, 3]))
    assert output.shape == (2, 4, 8, 6)
    assert not output.any()


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_come_back_where_they_were(patch: int) -> None:
    model = DiT(DiTConfig(4, (8, 6), width=32, depth=1, num_heads=2, patch_size=patch))
    latents = torch.randn(3, 4, 8, 6)
    tokens = model.patchify(latents)
    assert tokens.shape == (3, 48 // patch**2, 4 * patch**2)
    assert torch.equal(model.unpatchify(tokens), latents)
    # The second token is the patch to the right of the first.
    assert torch.equal(
        tokens[:, 1].reshape(3, 4, patch, patch), latents[:, :, :patch, patch : 2 * patch]
    )


@pytest.mark.parametrize(
    "changes", [{}, {"mlp": "gelu", "norm": "layernorm", "rope": False}, {"qk_norm": True}]
)
def test_every_parameter_is_trained_and_checkpointing_changes_nothing(changes: dict) -> None:
    def gradients(checkpoint_activations: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        shape = dict(vars(TINY)) | changes
        model = DiT(DiTConfig(**shape | {"checkpoint_activations": checkpoint_activations}))
        for parameter in model.parameters():  # away from the zeros, where most gradients vanish
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        x, t = torch.randn(3, 4, 8, 6), torch.rand(3)
        model(x, t, torch.tensor([0, 1, 2])).square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {name: grad for name, grad in found.items() if grad is not None}

    plain, saving = gradients(False), gradients(True)
    trained = [
        n
        for n, p in DiT(DiTConfig(**dict(vars(TINY)) | changes)).named_parameters()
        if p.requires_grad
    ]
    assert sorted(plain) == sorted(trained)
    assert all(plain[name].abs().sum() > 0 for name in plain)
    assert all(torch.allclose(plain[name], saving[name], atol=1e-5) for name in plain)


def test_dropped_labels_become_the_null_class() -> None:
    labels = drop_labels(torch.tensor([0, 1, 2]), torch.tensor([False, True, False]), 3)
    assert labels.tolist() == [0, 3, 2]
