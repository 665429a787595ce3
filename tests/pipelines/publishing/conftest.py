"""What the tests of publishing share: folders as runs leave them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fae.pipelines.config import load_recipe
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae_core import checkpoint
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tests.tiny import SMALLEST_BACKBONE, TINY


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Folders as runs leave them: fae, decoder, dit, flow, a store and scores."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = load_recipe(
        "photos-dinov2s",
        [
            *TINY,
            *SMALLEST_BACKBONE,
            "data.path=/home/somebody/secret place/photos",
            "latents=s3://private-bucket/latents",
            "tracking.uri=https://me:password@mlflow.example",
        ],
    )
    backbone = backbone_of(recipe)
    marks = backbone_fingerprints(recipe, backbone)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    sha256 = checkpoint.save(folder / "fae/autoencoder.safetensors", autoencoder, marks)
    shape = PixelDecoderConfig(backbone.dim, backbone.grid, 32, width=32, depth=1, num_heads=2)
    decoder = PixelDecoder(shape)
    torch.nn.init.normal_(decoder.output.weight, std=0.2)
    checkpoint.save(folder / "decoder/pixel_decoder.safetensors", decoder, marks)
    latents = (recipe.autoencoder.latent_dim, backbone.grid)
    dit = DiT(DiTConfig.preset("S", *latents, num_classes=3, width=32, depth=1, num_heads=2))
    flow = StarFlow(StarFlowConfig.preset("S", *latents, num_classes=3, width=64, layers=(1, 1)))
    for name, model, std in (("dit", dit, 0.4), ("flow", flow, 0.1)):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
        model.set_latent_stats(torch.arange(8) / 8, torch.arange(1, 9) / 4)
        made_with = {"autoencoder": sha256, "latents": "0"}
        checkpoint.save(folder / name / "generator.safetensors", model, made_with)
    for name in ("fae", "decoder", "dit", "flow"):
        (folder / name / "recipe.yaml").write_text(recipe.to_yaml())
        (folder / name / "result.json").write_text('{"mse": 0.25}')
        Image.new("RGB", (8, 8)).save(folder / name / "validation.png")
        keys = pa.table({"key": ["a", "b"], "uri": ["/a", "/b"]})
        pq.write_table(keys, folder / name / "plan.parquet")
    store = str(folder / "store")
    plan = ensure_plan(
        store,
        [ImageRecord(f"{i}", f"/x/{i}") for i in range(4)],
        4,
        {"autoencoder weights": sha256},
    )
    values = {"mean": np.random.default_rng(0).normal(size=(4, 8, 2, 2)).astype(np.float16)}
    write_shard(store, 0, plan.shard(0), list(range(4)), values, [], plan.fingerprint)
    commit(store, plan, {})
    (folder / "scores").mkdir()
    scores = {
        "scores": {"frechet_backbone": 12.5, "num_images": 100},
        "warnings": [],
        "inputs": {"scores": ["frechet_backbone"]},
    }
    (folder / "scores/scores.json").write_text(json.dumps(scores))
    return folder
