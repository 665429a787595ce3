"""The flow: an exact inverse, an exact log-determinant, causality, and likelihoods that mean what
they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fae_core.generators.starflow import SIZES, StarFlow, StarFlowConfig, flow_loss, guide
from fae_core.layers import num_parameters

SMALL = StarFlowConfig(3, (3, 4), width=64, layers=(1, 2, 2), num_classes=5)


def random_flow(config: StarFlowConfig, seed: int = 0, scale: float = 0.3) -> StarFlow:
    """A flow whose blocks are far from the identity."""
    torch.manual_seed(seed)
    model = StarFlow(config).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.output.weight, std=scale / config.width**0.5)
        torch.nn.init.normal_(block.output.bias, std=scale)
    return model


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 21.8), ("B", 57.5), ("M", 128.7), ("L", 278.5), ("XL", 1413.0)],
)
def test_preset_sizes_have_the_reference_parameter_counts(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = StarFlow(StarFlowConfig.preset(size, 32, (16, 16)))
    assert num_parameters(model) / 1e6 == pytest.approx(
        millions, rel=0.001 if size == "XL" else 0.003
    )


@pytest.mark.parametrize("layers", sorted({layers for _, layers in SIZES.values()}))
def test_sampling_inverts_the_flow_at_every_presets_depth(layers: tuple[int, ...]) -> None:
    model = random_flow(StarFlowConfig(4, (4, 4), width=64, layers=layers, num_classes=5))
    latents, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 4])
    with torch.no_grad():
        z = model(latents, labels)["z"].transpose(1, 2).unflatten(2, (4, 4))
    assert (z - latents).abs().max() > 0.1
    assert torch.allclose(model.sample(z, labels), latents, atol=1e-4)


def test_a_new_flow_is_the_identity() -> None:
    latents = torch.randn(2, 3, 3, 4)
    output = StarFlow(SMALL)(latents, torch.tensor([0, 1]))
    assert torch.allclose(output["z"], latents.flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.allclose(output["log_det"], torch.zeros(2), atol=1e-5)


def test_the_log_determinant_is_autograds() -> None:
    model, labels = random_flow(SMALL), torch.tensor([2])
    latents = torch.randn(3, 3, 4)

    def flat(values: Tensor) -> Tensor:
        return model(values.view(1, 3, 3, 4), labels)["z"].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, latents.flatten())
    _, expected = torch.linalg.slogdet(jacobian)
    assert model(latents[None], labels)["log_det"].item() == pytest.approx(
        expected.item(), abs=1e-4
    )


def test_a_block_looks_only_at_tokens_before_its_own() -> None:
    model = random_flow(SMALL)
    block, x = model.blocks[-1], torch.randn(1, 12, 3)
    labels = torch.tensor([0])
    before, _ = block(x, labels)
    changed = x.clone()
    changed[:, 7] += 1.0
    after, log_std = block(changed, labels)
    _, log_std_before = block(x, labels)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert torch.allclose(log_std_before[:, :8], log_std[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-4)


def test_neighbouring_blocks_read_in_opposite_directions() -> None:
    model = random_flow(StarFlowConfig(2, (2, 3), width=64, layers=(1, 1), num_classes=2))
    x = torch.randn(1, 6, 2)
    changed = x.clone()
    changed[:, 3] += 1.0
    first, second = (model.blocks[i] for i in range(2))
    forward = (first(x, None)[1] - first(changed, None)[1]).abs().sum(-1)[0]
    labels = torch.tensor([0])
    backward = (
        (second(x.flip(1), labels)[1] - second(changed.flip(1), labels)[1]).abs().sum(-1)[0].flip(0)
    )
    assert (forward[:4] < 1e-6).all() and (forward[4:] > 1e-6).all()
    assert (backward[3:] < 1e-6).all() and (backward[:3] > 1e-6).all()


def test_sampling_with_a_cache_equals_recomputing_every_token() -> None:
    model = random_flow(SMALL)
    block, labels, null = model.blocks[-1], torch.tensor([1, 3]), torch.tensor([5, 5])
    z = torch.randn(2, 12, 3)
    with torch.no_grad():
        tokens = torch.zeros(2, 0, 3)
        for i in range(12):
            means, stds = [], []
            for y in (labels, null):
                hidden = block.run(block.embed(tokens, y), 0, None)
                mean, std = block.affine(hidden[:, -1:])
                means.append(mean)
                stds.append(std)
            mean, std = guide(means[0], means[1], stds[0], stds[1], 1.5)
            tokens = torch.cat([tokens, mean + std * z[:, i : i + 1]], dim=1)
        cached = block.inverse(z, labels, null, guidance=1.5)
    assert torch.allclose(cached, tokens, atol=1e-5)


def test_only_the_deep_block_knows_the_class() -> None:
    model = random_flow(SMALL)
    assert [block.prefix is not None for block in model.blocks] == [False, False, True]
    latents = torch.randn(1, 3, 3, 4)
    likelihoods = [model.log_likelihood(latents, torch.tensor([c])).item() for c in (0, 1)]
    assert abs(likelihoods[0] - likelihoods[1]) > 1e-3


def test_guidance_extrapolates_the_score() -> None:
    mean, null, std, null_std = (
        torch.tensor(0.5),
        torch.tensor(-0.2),
        torch.tensor(0.6),
        torch.tensor(0.9),
    )
    omega, x = 2.0, torch.tensor(0.3)
    guided_mean, guided_std = guide(mean, null, std, null_std, omega)
    conditional, unconditional = -(x - mean) / std**2, -(x - null) / null_std**2
    expected = conditional + omega * (conditional - unconditional)
    assert -(x - guided_mean) / guided_std**2 == pytest.approx(expected.item(), rel=1e-5)
    assert guide(mean, null, std, null_std, 0.0) == (mean, std)


@pytest.mark.integration
def test_the_likelihood_of_a_known_gaussian_reaches_its_entropy() -> None:
    # Correlated Gaussian noise with a class-dependent mean: affine flows can represent it exactly.
    torch.manual_seed(0)
    config = StarFlowConfig(2, (1, 2), width=64, layers=(1, 1), num_classes=2, noise_std=0.0)
    model = StarFlow(config)
    factor = torch.tensor(
        [[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.6, 0], [0.1, 0.2, 0.3, 0.5]]
    )
    entropy = 0.5 * math.log(2 * math.pi * math.e) + factor.diag().log().sum().item() / 4
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 2, (n,))
        x = torch.randn(n, 4) @ factor.T + labels[:, None].float()
        return x.view(n, 1, 2, 2).permute(0, 3, 1, 2), labels

    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400)
        x, labels = draw(256)
        terms = flow_loss(model, x, torch.zeros_like(x), labels, 0.0)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    x, labels = draw(8192)
    with torch.no_grad():
        nll = -model.log_likelihood(x, labels).mean().item() / 4
    assert nll == pytest.approx(entropy, abs=0.03)
    # Not below it, but for the noise of the mean over 8,192 draws.
    assert nll > entropy - 0.015


def test_bits_per_dimension_are_those_of_the_density() -> None:
    model, latents, labels = random_flow(SMALL), torch.randn(4, 3, 3, 4), torch.tensor([0, 1, 2, 3])
    terms = flow_loss(model, latents, torch.zeros_like(latents), labels, 0.0)
    expected = -model.log_likelihood(latents, labels).mean() / 36 / math.log(2)
    assert terms["bits_per_dim"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_denoising_is_tweedies_estimate() -> None:
    # Under the identity flow p is the standard normal: x + s²·(-x).
    latents = torch.randn(2, 3, 3, 4)
    model = StarFlow(SMALL)
    expected = latents * (1 - SMALL.noise_std**2)
    assert torch.allclose(model.denoise(latents, torch.tensor([0, 1])), expected, atol=1e-5)


def test_every_parameter_is_trained_and_checkpointing_changes_nothing() -> None:
    latents, labels = torch.randn(4, 3, 3, 4), torch.tensor([0, 1, 2, 5])

    def gradients(checkpoint_activations: bool) -> dict[str, Tensor]:
        config = StarFlowConfig(**vars(SMALL) | {"checkpoint_activations": checkpoint_activations})
        model = random_flow(config).train()
        flow_loss(model, latents, torch.zeros_like(latents), labels, 0.0)["loss"].backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, saving = gradients(False), gradients(True)
    assert sorted(plain) == sorted(n for n, _ in StarFlow(SMALL).named_parameters())
    assert all(torch.allclose(plain[n], saving[n], atol=1e-5) for n in plain)
