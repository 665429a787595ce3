"""The smallest precompute that is still one: a random ViT on 32-pixel crops, JPEGs of noise, shards
of eight."""

from __future__ import annotations

import io
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae_core import checkpoint

ROOT = Path(__file__).parents[1]
SHARD_SIZE = 8
TINY = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "backbone.image_size=32",
    "image_size=32",
    "autoencoder.latent_dim=8",
    "autoencoder.encoder.num_heads=3",
    "autoencoder.encoder.head_dim=32",
    "autoencoder.decoder.num_heads=3",
    "autoencoder.decoder.depth=1",
    f"precompute.shard_size={SHARD_SIZE}",
    "precompute.threads_per_actor=1",
]
SMALLEST_BACKBONE = [
    "backbone.name=test_vit",
    "autoencoder.encoder.num_heads=2",
    "autoencoder.decoder.num_heads=2",
]
"""After TINY: timm's ViT for tests, 64 wide and six blocks deep."""


def save_autoencoder(path: Path) -> Path:
    """An untrained autoencoder for TINY."""
    recipe = load_recipe("photos-dinov2s", TINY)
    backbone = backbone_of(recipe)
    torch.manual_seed(0)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    checkpoint.save(path, model, backbone_fingerprints(recipe, backbone))
    return path


def noisy_jpegs(count: int) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(buffer, "JPEG")
        yield buffer.getvalue()


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def wait_for_checkpoint(process: subprocess.Popen, run: Path) -> None:
    """Returns when the training `process` has written its first checkpoint of the folder `run`."""
    deadline = time.monotonic() + 240
    while not list((run / "checkpoints").glob("step_*.pt")):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.02)
