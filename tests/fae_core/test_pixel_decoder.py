"""The pixel decoder's size and geometry, its losses against other libraries, and what the adversary
hears."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fae_core.backbone import Backbone, load_backbone
from fae_core.discriminator import (
    Discriminator,
    LeCam,
    PatchDiscriminator,
    augment,
    discriminator_loss,
)
from fae_core.layers import num_parameters
from fae_core.losses import (
    BackboneDistance,
    adaptive_weight,
    edge_error,
    noise_scale,
    pixel_error,
)
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig, from_uint8, to_uint8


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("vit_tiny_patch16_224", "random")


def images(seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_vit_l_decoder_is_within_a_fifth_of_a_percent_of_the_papers_305_36_million() -> None:
    with torch.device("meta"):
        decoder = PixelDecoder(PixelDecoderConfig.preset("L", 1536, (16, 16), 256))
    assert num_parameters(decoder) == pytest.approx(305.36e6, rel=0.002)


def test_a_patch_of_pixels_comes_from_its_own_token() -> None:
    decoder = PixelDecoder(PixelDecoderConfig(8, (4, 4), 32, width=16, depth=0, num_heads=2))
    features = torch.randn(1, 16, 8)
    changed = features.clone()
    changed[:, 6] += 1.0  # second row, third column
    difference = (decoder(features) - decoder(changed)).abs().sum(1)[0]
    inside = difference[8:16, 16:24]
    assert inside.sum() > 0
    assert difference.sum().item() == pytest.approx(inside.sum().item())


def test_the_convolutional_head_draws_across_the_borders_of_patches() -> None:
    config = PixelDecoderConfig(8, (4, 4), 32, width=16, depth=0, num_heads=2, head="convolution")
    decoder = PixelDecoder(config)
    features = torch.randn(1, 16, 8)
    changed = features.clone()
    changed[:, 6] += 1.0  # second row, third column
    assert decoder(features).shape == (1, 3, 32, 32)
    difference = (decoder(features) - decoder(changed)).abs().sum(1)[0]
    inside = difference[8:16, 16:24].sum()
    assert 0 < inside < 0.99 * difference.sum()
    assert difference[:, 0].sum() == 0  # and not everywhere


def test_the_convolutional_head_needs_patches_of_a_power_of_two() -> None:
    config = PixelDecoderConfig(8, (4, 4), 48, width=16, depth=0, num_heads=2, head="convolution")
    with pytest.raises(ValueError, match="power of two, not 12 px"):
        PixelDecoder(config)


def test_pixel_and_edge_errors_are_means_over_the_halved_images() -> None:
    a, b = images(0), images(1)
    halved = [(a, b), *[tuple(x.unflatten(2, (-1, s)).mean(3).unflatten(3, (-1, s)).mean(4)
                              for x in (a, b)) for s in (2, 4)]]  # fmt: skip
    expected = sum((x - y).abs().mean() for x, y in halved) / 3
    torch.testing.assert_close(pixel_error(a, b, "l1", scales=3), expected)
    rows = sum((x.diff(dim=2) - y.diff(dim=2)).abs().mean() for x, y in halved)
    columns = sum((x.diff(dim=3) - y.diff(dim=3)).abs().mean() for x, y in halved)
    torch.testing.assert_close(edge_error(a, b, scales=3), (rows + columns) / 6)
    assert edge_error(a, a + 0.1, scales=2) < 1e-6 < pixel_error(a, a + 0.1, "l1", scales=2)


def test_features_enter_standardized() -> None:
    config = PixelDecoderConfig(8, (2, 2), 16, width=16, depth=1, num_heads=2)
    torch.manual_seed(0)
    plain = PixelDecoder(config)
    scaled = PixelDecoder(config)
    scaled.load_state_dict(plain.state_dict())
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    scaled.set_feature_stats(mean, std)
    features = torch.randn(2, 4, 8)
    assert torch.allclose(scaled(features * std + mean), plain(features), atol=1e-5)


def test_pixels_survive_the_way_to_uint8_and_back() -> None:
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)
    assert to_uint8(torch.tensor([-0.2, 1.3]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[
        0, 0
    ].tolist() == [
        [0, 0, 0],
        [255, 255, 255],
    ]


def test_the_backbones_distance_grows_with_the_damage_and_trains_the_image_alone(
    backbone: Backbone,
) -> None:
    distance = BackboneDistance(backbone)
    target = images(size=224)
    output = target.clone().requires_grad_(True)
    assert distance(target, target).abs().max() < 1e-6
    near = distance(target + 0.02 * torch.randn_like(target), target)
    far = distance(torch.rand_like(target), target)
    assert (near < far).all() and (far < 4).all()
    distance(output + 0.1, target).sum().backward()
    assert output.grad is not None and output.grad.abs().sum() > 0
    assert not list(distance.parameters())


def test_the_patch_discriminator_has_the_reference_size() -> None:
    # ml-starflow's holds 1.91 M parameters.
    assert num_parameters(PatchDiscriminator()) == pytest.approx(1.91e6, rel=0.01)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["patch", "backbone"])
def test_a_discriminator_learns_to_tell_two_kinds_of_image(kind: str, backbone: Backbone) -> None:
    torch.manual_seed(0)
    judge = Discriminator(kind, backbone.dim, backbone.grid, (2, 5))
    optimizer = torch.optim.Adam(judge.parameters(), 3e-4 if kind == "patch" else 2e-3)
    generator = torch.Generator().manual_seed(1)
    size = 224 if kind == "backbone" else 32

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        smooth = torch.rand(2, 3, 1, 1, generator=generator).expand(2, 3, size, size)
        return smooth, torch.rand(2, 3, size, size, generator=generator)

    losses = []
    for _ in range(40):
        real, fake = pair()
        loss = discriminator_loss(judge(real, backbone), judge(fake, backbone))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * losses[0], "the mean, because two images a step are noisy"
    assert all(p.grad is None for p in backbone.parameters())


def test_hinge_losses_are_their_definition() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_lecam_compares_with_the_means_of_the_steps_before() -> None:
    lecam = LeCam(decay=0.9)
    for _ in range(2):  # micro-batches of one step
        assert lecam(torch.tensor([2.0]), torch.tensor([-1.0])).item() == pytest.approx(4.0 + 1.0)
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(1.0))
    assert lecam.real.item() == pytest.approx(0.2) and lecam.fake.item() == pytest.approx(-0.1)
    expected = (2.0 + 0.1) ** 2 + (0.2 + 1.0) ** 2
    assert lecam(torch.tensor([2.0]), torch.tensor([-1.0])).item() == pytest.approx(expected)
    # Half of the images, with the same logits as the running means have.
    lecam.update(0.5 * lecam.real, 0.5 * lecam.fake, torch.tensor(0.5))
    assert lecam.real.item() == pytest.approx(0.2) and lecam.fake.item() == pytest.approx(-0.1)


def test_augmentation_is_the_identity_in_the_middle_and_shifts_by_its_draws() -> None:
    x = images()
    middle = torch.full((2, 5), 0.5)
    assert torch.allclose(augment(x, middle), x, atol=1e-6)
    corner = middle.clone()
    corner[:, 3] = 0.0  # rows from an eighth above
    shifted = augment(x, corner)
    assert torch.allclose(shifted[:, :, 8:], x[:, :, :-8], atol=1e-6)
    assert (shifted[:, :, :8] == 0.5).all()
    brighter = middle.clone()
    brighter[:, 0] = 1.0
    assert torch.allclose(augment(x, brighter), x + 0.25, atol=1e-6)


def test_the_adaptive_weight_balances_the_gradients() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4)
    output = x @ weight
    reconstruction, adversarial = (output - 1).square().mean(), 10 * output.mean()
    lam = adaptive_weight(reconstruction, adversarial, weight)
    (a,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (b,) = torch.autograd.grad(lam * adversarial, weight)
    assert b.norm().item() == pytest.approx(a.norm().item(), rel=1e-4)


def test_noise_follows_the_size_of_the_features() -> None:
    assert noise_scale(0.4, 7.0, None) == 0.4
    assert noise_scale(0.4, 3.0, 1.5) == pytest.approx(0.8)
