"""The text-to-image transformer against the paper's parameter counts and its own promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fae_core.flow_matching import flow_matching_loss
from fae_core.generators.mmdit import MMDiT, MMDiTConfig
from fae_core.layers import num_parameters
from fae_core.samplers import GuidanceInterval, sample_ode

TINY = MMDiTConfig(4, (4, 6), text_dim=12, width=32, depth=2, num_heads=2)


def count(config: MMDiTConfig) -> int:
    with torch.device("meta"):
        return num_parameters(MMDiT(config))


def model_with_weights(**changes: object) -> MMDiT:
    """A model away from the zeros of its initialization, where text would change nothing."""
    torch.manual_seed(0)
    model = MMDiT(dataclasses.replace(TINY, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 3, length: int = 5) -> tuple[torch.Tensor, ...]:
    """Latents, times, states and a mask whose rows have 1, 2, … words."""
    torch.manual_seed(1)
    mask = torch.arange(length) < 1 + torch.arange(batch)[:, None]
    states = torch.randn(batch, length, 12) * mask[..., None]
    return torch.randn(batch, 4, 4, 6), torch.rand(batch), states, mask


@pytest.mark.parametrize(
    ("size", "latent", "text_dim", "expected"),
    [
        # Appendix D prints 603.46 M and 2017.84 M, which only this text width gives.
        ("L", (32, (16, 16)), 1280, 603_457_568),
        ("XL", (64, (24, 24)), 1280, 2_017_840_192),
        # Table 3 prints 604 M: the width of T5-XL's states, the encoder that the paper names.
        ("L", (32, (16, 16)), 2048, 604_244_000),
    ],
)
def test_the_papers_models_have_the_papers_parameters(size, latent, text_dim, expected) -> None:
    assert count(MMDiTConfig.preset(size, *latent, text_dim)) == expected


def test_query_and_key_norms_add_a_gain_for_each_but_the_queries_that_are_not_used() -> None:
    plain = MMDiTConfig.preset("L", 32, (16, 16), 1280)
    assert count(dataclasses.replace(plain, qk_norm=True)) - count(plain) == (16 * 4 - 1) * 64
    assert count(dataclasses.replace(plain, rope=True)) == count(plain)


def test_a_size_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="there are S, B, L, XL"):
        MMDiTConfig.preset("XXL", 32, (16, 16), 1280)


def test_an_untrained_model_predicts_zero() -> None:
    latents, t, states, mask = inputs()
    output = MMDiT(TINY)(latents, t, states, mask)
    assert output.shape == latents.shape
    assert not output.any()


@pytest.mark.parametrize("changes", [{}, {"rope": True, "qk_norm": True}, {"patch_size": 2}])
def test_what_the_mask_hides_changes_nothing(changes: dict) -> None:
    model = model_with_weights(**changes)
    latents, t, states, mask = inputs()
    plain = model(latents, t, states, mask)
    filled = torch.where(mask[..., None], states, 7.0)
    assert torch.equal(model(latents, t, filled, mask), plain)
    longer = torch.nn.functional.pad(states, (0, 0, 0, 4)), torch.nn.functional.pad(mask, (0, 4))
    torch.testing.assert_close(model(latents, t, *longer), plain, rtol=1e-5, atol=1e-5)
    # The words that it shows do change the result.
    assert not torch.allclose(model(latents, t, states + mask[..., None], mask), plain, atol=1e-3)


def test_a_caption_without_any_word_is_finite() -> None:
    latents, t, states, mask = inputs()
    assert model_with_weights()(latents, t, states, torch.zeros_like(mask)).isfinite().all()


def test_the_rest_of_the_batch_does_not_change_a_sample() -> None:
    model = model_with_weights().eval()
    noise, _, states, mask = inputs()

    def velocity(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return model(x, t, states[rows], mask[rows])

    def draw(rows: list[int]) -> torch.Tensor:
        guidance = [GuidanceInterval(0.9, 0.0, 1.5)]
        with torch.no_grad():
            return sample_ode(
                velocity, noise[rows], torch.tensor(rows), 4, guidance=guidance, null_class=0
            )

    together = draw([0, 1, 2])
    torch.testing.assert_close(draw([2]), together[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draw([2, 1]), together[[2, 1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"rope": True, "qk_norm": True}])
def test_every_parameter_is_trained_and_checkpointing_changes_nothing(changes: dict) -> None:
    def gradients(checkpoint_activations: bool) -> dict[str, torch.Tensor]:
        model = model_with_weights(checkpoint_activations=checkpoint_activations, **changes)
        latents, t, states, mask = inputs()
        flow_matching_loss(
            lambda x, t, rows: model(x, t, states, mask), latents, latents.flip(0), t, mask
        )["loss"].backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {name: grad for name, grad in grads.items() if grad is not None and grad.any()}

    plain, saving = gradients(False), gradients(True)
    assert sorted(plain) == sorted(
        name for name, _ in model_with_weights(**changes).named_parameters()
    )
    for name, grad in plain.items():
        torch.testing.assert_close(saving[name], grad, rtol=1e-4, atol=1e-6)
