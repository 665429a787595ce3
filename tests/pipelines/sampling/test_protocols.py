"""sample.protocol: whose values the settings have, and that they reach the sampler."""

from __future__ import annotations

import math

import pytest
import torch

from fae.pipelines.config import load_recipe
from fae.pipelines.config.facts import deciding_values
from fae.pipelines.config.sections.jobs import PROTOCOLS, SampleSection
from fae.pipelines.sampling.latent_sampler import LatentSampler, image_noise
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.samplers import GuidanceInterval, sample_ode, sample_sde

SHAPE = (4, 4, 4)
LABELS = torch.tensor([0, 2])


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    network = DiT(DiTConfig(4, (4, 4), width=16, depth=1, num_heads=2, num_classes=3))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def draw(model: DiT, *overrides: str) -> torch.Tensor:
    recipe = load_recipe("photos-dinov2s", overrides)
    noise = image_noise(recipe.seed, range(2), SHAPE)
    with torch.inference_mode():
        sampler = LatentSampler(model, recipe.sample, recipe.seed, torch.device("cpu"))
        return sampler(noise, LABELS, [0, 1])


def test_the_default_is_what_the_papers_say() -> None:
    section = SampleSection()
    assert (section.diffusion_scale, section.last_step, section.guidance_channels) == (
        1,
        None,
        None,
    )
    assert section == SampleSection(protocol="fae")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_sets_what_is_not_given(name: str) -> None:
    values = PROTOCOLS[name]
    section = load_recipe("photos-dinov2s", [f"sample.protocol={name}"]).sample
    found = section.model_dump(mode="json")
    assert {key: found[key] for key in values} == values
    changed = load_recipe("photos-dinov2s", [f"sample.protocol={name}", "sample.num_steps=7"])
    assert changed.sample.num_steps == 7
    again = SampleSection.model_validate(changed.sample.model_dump())
    assert again == changed.sample


def test_the_values_are_those_of_the_code_that_is_named() -> None:
    sit = SampleSection(protocol="sit")
    assert (sit.sampler, sit.diffusion_scale, sit.last_step) == ("sde", 2.0, 0.04)
    lightningdit = SampleSection(protocol="lightningdit")
    assert (lightningdit.sampler, lightningdit.num_steps) == ("ode", 249)
    assert lightningdit.shift == pytest.approx(1 / 0.3)
    guided = [(i.start, i.end, i.scale) for i in lightningdit.guidance]
    assert guided == [(0.875, 0.0, 6.7)]
    assert sit.guidance_channels == lightningdit.guidance_channels == 3


def test_the_values_decide_and_not_their_names() -> None:
    named = load_recipe("photos-dinov2s", ["sample.protocol=rae"])
    keys = ["sample.sampler=ode", "sample.num_steps=49", "sample.shift=dimension"]
    spelled = load_recipe("photos-dinov2s", keys)
    assert deciding_values(named, ["sample"]) == deciding_values(spelled, ["sample"])


def test_settings_reach_the_sampler(model: DiT) -> None:
    noise = image_noise(0, range(2), SHAPE)
    with torch.inference_mode():
        rae = sample_ode(model, noise, LABELS, 49, math.sqrt(64 / 4096))
        assert torch.allclose(draw(model, "sample.protocol=rae"), model.denormalize(rae))
        guidance = [GuidanceInterval(0.875, 0.0, 6.7)]
        theirs = sample_ode(model, noise, LABELS, 9, 1 / 0.3, guidance, 3, 3)
        found = draw(model, "sample.protocol=lightningdit", "sample.num_steps=9")
        assert torch.allclose(found, model.denormalize(theirs))

        def no_noise(step: int) -> torch.Tensor:
            return torch.zeros(2, *SHAPE)

        settings = ["sample.protocol=sit", "sample.num_steps=2", "sample.diffusion_scale=0"]
        still = sample_sde(model, noise, LABELS, no_noise, 2, diffusion_scale=0.0, last_step=0.04)
        assert torch.allclose(draw(model, *settings), model.denormalize(still))
        assert not torch.allclose(draw(model, *settings[:2]), model.denormalize(still), atol=0.1)
