"""sample.guide: guidance away from a weaker network, and which networks can be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fae
from fae.pipelines.config import Recipe, RecipeError, load_recipe
from fae.pipelines.doctor.memory import sample_memory
from fae.pipelines.networks.text_encoder import SOURCE, CaptionEncoder
from fae.pipelines.sampling import guide as guide_module
from fae.pipelines.sampling.grid import draw_grid
from fae.pipelines.sampling.guide import checked_guide
from fae.pipelines.sampling.image_sampler import ImageSampler
from fae.pipelines.sampling.sample_job import sample, sample_parts
from fae.pipelines.storage.claims import StoreMismatch
from fae_core import checkpoint
from fae_core.checkpoint import CheckpointError
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.latent_model import LatentModel
from fae_core.generators.mmdit import MMDiT, MMDiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.text import TextSpec
from tests.fake_gpu import GPU, FakeGPU
from tests.here import leave_ray_out
from tests.tiny import save_decoders, save_text_encoder

SHAPE = (4, 4, 4)
LOADED = "networks, twice while they are loaded"
GUIDED = "sample.guidance=[{start: 1.0, end: 0.0, scale: 2.0}]"


def dit(seed: int, width: int = 16, **more: int) -> DiT:
    """A DiT whose output is not zero, as an untrained one's is."""
    torch.manual_seed(seed)
    settings = {"num_heads": 2, "num_classes": 2, **more}
    model = DiT(DiTConfig(4, (4, 4), width=width, depth=1, **settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def moved(model: LatentModel) -> LatentModel:
    """With the statistics of other latents."""
    model.set_latent_stats(torch.full((4,), 0.1), torch.ones(4))
    return model


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generator, its decoders, and a guide."""
    folder = tmp_path_factory.mktemp("networks")
    marks = {"autoencoder": save_decoders(folder, SHAPE, 32), "latents": "a store"}
    checkpoint.save(folder / "generator.safetensors", dit(0, 32), marks)
    checkpoint.save(folder / "guide.safetensors", dit(1), {**marks, "latents": "another store"})
    return folder


def recipe_of(networks: Path, *more: str) -> Recipe:
    names = ("generator", "autoencoder", "pixel_decoder")
    values = [
        *(f"{name}.checkpoint={networks / name}.safetensors" for name in names),
        "sample.num_images=5", "sample.num_steps=3", "sample.batch_size=4", "sample.precision=fp32",
        *more,
    ]  # fmt: skip
    return load_recipe("photos-dinov2s", values)


def pictures(recipe: Recipe) -> np.ndarray:
    return ImageSampler(recipe)([0, 1, 2], [0, 1, 0]).astype(int)


def test_guidance_leads_away_from_the_guide(networks: Path) -> None:
    plain = pictures(recipe_of(networks))
    guide = f"sample.guide={networks / 'guide.safetensors'}"
    sampler = ImageSampler(recipe_of(networks, GUIDED, guide))
    found = sampler([0, 1, 2], [0, 1, 0]).astype(int)
    assert np.abs(found - plain).max() > 1
    assert np.abs(found - pictures(recipe_of(networks, GUIDED))).max() > 1
    itself = f"sample.guide={networks / 'generator.safetensors'}"
    assert np.abs(pictures(recipe_of(networks, GUIDED, itself)) - plain).max() <= 1


def test_python_draws_the_same(networks: Path) -> None:
    guide = networks / "guide.safetensors"
    expected = ImageSampler(recipe_of(networks, GUIDED, f"sample.guide={guide}"))([0, 1], [0, 1])
    paths = [
        networks / f"{name}.safetensors" for name in ("generator", "autoencoder", "pixel_decoder")
    ]
    settings = {"num_steps": 3, "guidance": 2.0, "batch_size": 4, "precision": "fp32"}
    for given in (guide, fae.load(guide)):
        drawn = fae.sample(*paths, labels=[0, 1], guide=given, **settings)
        assert np.array_equal(drawn, expected)
    with pytest.raises(CheckpointError, match="No checkpoint"):
        fae.sample(*paths, labels=[0, 1], guide=networks / "nothing.safetensors", **settings)


@pytest.mark.parametrize("on_gpu", ["generator", "guide"])
def test_a_network_on_a_gpu_is_compared_with_one_on_the_cpu(
    networks: Path, on_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guide_module, "SAME_STATISTICS", 1.0)  # a fake GPU's values read as 1
    gpu = FakeGPU()
    loaded = {
        name: checkpoint.load(networks / f"{name}.safetensors") for name in ("generator", "guide")
    }
    for name, network in loaded.items():
        gpu.place(network.module, GPU if name == on_gpu else torch.device("cpu"))
    with gpu.running():
        found = checked_guide("the guide", loaded["guide"], loaded["generator"])
    assert found is loaded["guide"].module


def test_samples_of_another_guide_are_refused(networks: Path, tmp_path: Path) -> None:
    guide = networks / "guide.safetensors"
    values = (f"output={tmp_path}", "sample.formats=[npz]", GUIDED)
    recipe = recipe_of(networks, *values, f"sample.guide={guide}")
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        sample(recipe, False)
        with pytest.raises(StoreMismatch, match="guide: "):
            sample(recipe_of(networks, *values), False)
    images = np.load(tmp_path / "samples.npz")["arr_0"].astype(int)
    sampler = ImageSampler(recipe)
    assert np.abs(sampler([0, 3], sampler.labels([0, 3])).astype(int) - images[[0, 3]]).max() <= 1


def test_without_a_guide_samples_are_identified_as_before(networks: Path) -> None:
    recipe = recipe_of(networks)
    assert "guide" not in sample_parts(recipe, ImageSampler(recipe))


def test_the_guide_is_counted_as_memory(networks: Path) -> None:
    path = networks / "guide.safetensors"
    without, with_guide = (
        sample_memory(recipe_of(networks, GUIDED, *more))[0].host[LOADED]
        for more in ((), (f"sample.guide={path}",))
    )
    guide = checkpoint.load(path).module
    assert with_guide - without == 2 * sum(
        t.nbytes for t in (*guide.parameters(), *guide.buffers())
    )


@pytest.mark.parametrize(
    ("make", "changed", "message"),
    [
        (lambda: dit(1), {"autoencoder": "another"}, "was trained with autoencoder another, here"),
        (lambda: moved(dit(1)), {}, "by other statistics"),
        (lambda: dit(1, num_classes=3), {}, "has num_classes 3, the generator 2"),
        (
            lambda: MMDiT(MMDiTConfig(4, (4, 4), 16, width=16, depth=1, num_heads=2)),
            {},
            "is of kind mmdit, the generator dit",
        ),
    ],
)
def test_a_network_that_cannot_guide_is_refused(
    networks: Path,
    tmp_path: Path,
    make: Callable[[], torch.nn.Module],
    changed: dict[str, str],
    message: str,
) -> None:
    marks = checkpoint.load(networks / "generator.safetensors").fingerprints
    path = tmp_path / "guide.safetensors"
    checkpoint.save(path, make(), {**marks, **changed})
    with pytest.raises(CheckpointError, match=message):
        ImageSampler(recipe_of(networks, GUIDED, f"sample.guide={path}"))


def test_a_guide_needs_a_scale(networks: Path) -> None:
    guide = f"sample.guide={networks / 'guide.safetensors'}"
    with pytest.raises(RecipeError, match=r"sample\.guide does nothing without a scale"):
        ImageSampler(recipe_of(networks, guide))


def test_the_grid_of_scales_needs_no_other_guidance(networks: Path, tmp_path: Path) -> None:
    recipe = recipe_of(networks, f"sample.guide={networks / 'guide.safetensors'}")
    widths = []
    for scales in ((2.0,), (1.0, 2.0)):
        draw_grid(recipe, str(tmp_path / "grid.png"), scales=scales)
        widths.append(Image.open(tmp_path / "grid.png").width)
    assert widths[1] > widths[0]


def test_a_generator_without_a_null_class_has_a_guide(networks: Path, tmp_path: Path) -> None:
    marks = checkpoint.load(networks / "generator.safetensors").fingerprints
    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, dit(0, label_dropout=0), marks)
    more = (GUIDED, f"generator.checkpoint={path}")
    with pytest.raises(RecipeError, match="without dropped labels"):
        ImageSampler(recipe_of(networks, *more))
    pictures(recipe_of(networks, *more, f"sample.guide={networks / 'guide.safetensors'}"))


def test_a_flow_without_a_null_class_is_not_guided(networks: Path, tmp_path: Path) -> None:
    marks = checkpoint.load(networks / "generator.safetensors").fingerprints
    path = tmp_path / "generator.safetensors"
    settings = {"width": 64, "layers": (1, 1), "num_classes": 2, "label_dropout": 0.0}
    checkpoint.save(path, StarFlow(StarFlowConfig(4, (4, 4), **settings)), marks)
    recipe = [f"generator.checkpoint={path}", GUIDED]  # that key is not a flow's
    ImageSampler(recipe_of(networks, *recipe))
    with pytest.raises(RecipeError, match=r"label_dropout=0.*Set sample\.flow_guidance=0"):
        ImageSampler(recipe_of(networks, *recipe, "sample.flow_guidance=1.0"))


def test_a_flow_has_no_guide(networks: Path, tmp_path: Path) -> None:
    marks = checkpoint.load(networks / "generator.safetensors").fingerprints
    path = tmp_path / "generator.safetensors"
    flow = StarFlow(StarFlowConfig(4, (4, 4), width=64, layers=(1, 1), num_classes=2))
    checkpoint.save(path, flow, marks)
    more = (f"generator.checkpoint={path}", f"sample.guide={networks / 'guide.safetensors'}")
    with pytest.raises(RecipeError, match="a normalizing flow has no velocity"):
        ImageSampler(recipe_of(networks, *more))


def test_texts_are_guided_by_the_guides_velocity_of_the_same_text(
    networks: Path, tmp_path: Path
) -> None:
    spec = TextSpec(weights=str(save_text_encoder(tmp_path / "text")), max_length=6)
    text = CaptionEncoder.load(spec)
    marks = checkpoint.load(networks / "generator.safetensors").fingerprints
    for seed, name in enumerate(("generator", "guide")):
        torch.manual_seed(seed)
        model = MMDiT(MMDiTConfig(4, (4, 4), 16, width=16, depth=1, num_heads=2))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        of_text = {**marks, **text.fingerprints, SOURCE: name}
        checkpoint.save(tmp_path / f"{name}.safetensors", model, of_text)
    recipe = recipe_of(
        networks, GUIDED, f"generator.checkpoint={tmp_path / 'generator.safetensors'}",
        f"sample.guide={tmp_path / 'guide.safetensors'}", f"text.weights={tmp_path / 'text'}",
        "prompt=a red cat",
    )  # fmt: skip
    sampler = ImageSampler(recipe)
    noise = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        found = sampler._latents()(noise, torch.tensor([0, 0]), [0, 1])
        states, mask = sampler.prompts.encode(["a red cat", "a red cat"])
        x = noise
        for t in (1.0, 2 / 3, 1 / 3):
            v, other = (
                model(x, torch.full((2,), t), states, mask)
                for model in (sampler.model, sampler.guide)
            )
            x = x - (other + 2.0 * (v - other)) / 3
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
