"""Crops and grids of other sizes than 256 px and 16×16: the whole way from crop to sample, without
Ray, and what the shipped recipes of 384 and 512 px cost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

import fae
from fae.cli import app
from fae.pipelines.config import Recipe, load_recipe
from fae.pipelines.data.reading import load_crops
from fae.pipelines.data.sources import list_images
from fae.pipelines.latents import LatentStore, precompute
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import (
    backbone_spec,
    build_autoencoder,
    build_generator,
    build_pixel_decoder,
)
from fae.pipelines.sampling import sample
from fae_core import checkpoint
from fae_core.autoencoder import autoencoder_loss
from fae_core.flow_matching import flow_matching_loss
from fae_core.pixel_decoder import from_uint8
from tests.tiny import SMALLEST_BACKBONE, TINY

NUM_IMAGES = 3
SIZES = {
    "384 px, 24×24": (384, 384, 24),
    "512 px, 32×32": (512, 512, 32),
    "384 px of a backbone of 192 px, 12×12": (384, 192, 12),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Crops of photographs, larger and smaller than the sizes."""
    import skimage.data

    folder = tmp_path_factory.mktemp("photographs")
    for index in range(NUM_IMAGES):
        name = ("astronaut", "chelsea", "coffee")[index % 3]
        picture = Image.fromarray(getattr(skimage.data, name)())
        (folder / name).mkdir(exist_ok=True)
        picture.crop((index, 0, 300 + 100 * index, 300)).save(folder / name / f"{index}.jpg")
    return folder


def fit(module: torch.nn.Module, loss, steps: int = 4) -> list[float]:
    """The losses of a few optimizer steps."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    module.eval()
    return losses


@pytest.mark.integration
@pytest.mark.parametrize(("image_size", "backbone_size", "side"), SIZES.values(), ids=SIZES)
def test_the_chain_from_crop_to_sample(
    photographs, tmp_path, without_ray, image_size, backbone_size, side
):
    def recipe_with(*more: str) -> Recipe:
        changes = [f"image_size={image_size}", f"backbone.image_size={backbone_size}"]
        decoder = ["pixel_decoder.width=48", "pixel_decoder.depth=1", "pixel_decoder.num_heads=2"]
        generator = ["generator.width=48", "generator.depth=1", "generator.num_heads=2"]
        return load_recipe(
            "photos-dinov2s",
            [*TINY, *SMALLEST_BACKBONE, *changes, *decoder, *generator,
             "generator.num_classes=3", f"data.path={photographs}", *more],
        )  # fmt: skip

    torch.manual_seed(0)
    recipe = recipe_with()
    crops, _, errors = load_crops(list_images(recipe.data), image_size, recipe.data)
    assert crops.shape == (NUM_IMAGES, image_size, image_size, 3) and not errors
    images = torch.from_numpy(crops)

    backbone = backbone_of(recipe)
    marks = backbone_fingerprints(recipe, backbone)
    features = backbone(images)
    assert features.shape == (NUM_IMAGES, side * side, backbone.dim)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    flat = features.flatten(0, 1)
    autoencoder.set_feature_stats(flat.mean(0), flat.std(0))
    noise = torch.zeros(NUM_IMAGES, side * side, 8)
    losses = fit(autoencoder, lambda: autoencoder_loss(autoencoder, features, noise)["loss"])
    assert losses[-1] < losses[0]
    sha256 = checkpoint.save(tmp_path / "fae/autoencoder.safetensors", autoencoder, marks)

    decoder = build_pixel_decoder(recipe.pixel_decoder, backbone.spec, image_size)
    decoder.set_feature_stats(flat.mean(0), flat.std(0))
    target = from_uint8(images)
    losses = fit(decoder, lambda: F.mse_loss(decoder(features), target))
    assert losses[-1] < losses[0]
    checkpoint.save(tmp_path / "fae/pixel_decoder.safetensors", decoder, marks)

    store_uri = str(tmp_path / "latents")
    networks = f"autoencoder.checkpoint={tmp_path / 'fae'}"
    to_store = recipe_with(networks, f"output={store_uri}", "precompute.precision=fp32")
    precompute(to_store, show_progress=False)
    store = LatentStore.open(store_uri)
    assert store.latent_shape == (8, side, side) and len(store) == NUM_IMAGES
    model = fae.FeatureAutoencoder.from_pretrained(
        tmp_path / "fae", backbone_weights="random", precision="fp32"
    )
    encoded = model.encode_images(list(crops)).numpy()
    stored = np.concatenate([store.read_shard(i)["mean"] for i in range(store.num_shards)])
    assert np.allclose(encoded, stored, atol=2e-2)
    assert model.decode_images(encoded).shape == crops.shape

    generator = build_generator(recipe.generator, store.latent_shape)
    statistics = (store.stats.mean, store.stats.std)
    generator.set_latent_stats(*(torch.tensor(s, dtype=torch.float32) for s in statistics))
    batch = next(store.reader(batch_size=3, seed=0))
    latents = generator.normalize(torch.from_numpy(batch.latents["mean"]))
    labels, noise, t = torch.from_numpy(batch.labels), torch.randn(latents.shape), torch.rand(3)

    def velocity_loss() -> torch.Tensor:
        return flow_matching_loss(generator, latents, noise, t, labels)["loss"]

    losses = fit(generator, velocity_loss)
    assert losses[-1] < losses[0]
    marks = {"autoencoder": sha256, "latents": store.manifest["fingerprint"]}
    checkpoint.save(tmp_path / "dit/generator.safetensors", generator, marks, store.class_names)

    output = tmp_path / "samples"
    sample(
        recipe_with(
            networks,
            f"pixel_decoder.checkpoint={tmp_path / 'fae'}",
            f"generator.checkpoint={tmp_path / 'dit'}",
            f"output={output}",
            "sample.num_images=2",
            "sample.num_steps=2",
            "sample.formats=[npz]",
            "sample.classes=[coffee,astronaut]",
            "sample.guidance=[{start: 1.0, end: 0.0, scale: 1.5}]",
        ),
        show_progress=False,
    )
    drawn = np.load(output / "samples.npz")["arr_0"]
    assert drawn.shape == (2, image_size, image_size, 3) and drawn.dtype == np.uint8
    again = fae.sample(
        tmp_path / "dit", model, labels=["coffee", "astronaut"], num_steps=2, guidance=1.5
    )
    assert np.abs(drawn.astype(int) - again).max() <= 1


@pytest.mark.integration
@pytest.mark.parametrize(
    ("recipe", "side", "job"),
    [
        ("imagenet384-siglip2b", 24, "generator"),
        ("imagenet512-dinov2b", 32, "autoencoder"),
    ],
)
def test_the_shipped_recipes_of_larger_crops_fit_a_gpu_of_80_gb(recipe, side, job):
    assert backbone_spec(load_recipe(recipe)).grid == (side, side)
    command = ["train", job, recipe, "data.path=photos", "--dry-run"]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    (device,) = re.findall(r"8 x worker, device: ([\d,]+)", printed.output)
    assert 10_000 < int(device.replace(",", "")) < 76_000
