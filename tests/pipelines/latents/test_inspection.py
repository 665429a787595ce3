"""`fae inspect` on stores and checkpoints, through the command line."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.sources import list_images
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan, open_plan
from fae.pipelines.latents.shards import write_shard
from fae_core import checkpoint
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder

PARTS = {"backbone": "b", "image size": "64"}


def make_store(folder: Path, photographs: Path) -> Path:
    records = list_images(DataSection(path=str(photographs)))[:20]
    plan = ensure_plan(str(folder), records, 8, PARTS)
    rng = np.random.default_rng(0)
    for index in range(plan.num_shards):
        rows = plan.shard(index)
        kept = list(range(len(rows)))[1 if index == 2 else 0 :]
        errors = [{"key": rows[0].key, "stage": "decode", "message": "[red]torn[/red]"}]
        values = {"mean": rng.normal(size=(len(kept), 4, 8, 8)).astype(np.float16)}
        lost = errors if index == 2 else []
        write_shard(str(folder), index, rows, kept, values, lost, plan.fingerprint)
    return folder


def run(*arguments: str):
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_a_finished_store_is_described_verified_and_drawn(tmp_path, photographs):
    store = make_store(tmp_path / "store", photographs)
    plan = open_plan(str(store))
    commit(str(store), plan, {"seconds": 2.0, "shards_encoded": 3})
    page = tmp_path / "page.html"
    result = run(
        str(store), "--verify", "--figure", str(tmp_path / "latents.png"), "--page", str(page)
    )
    assert result.exit_code == 0, result.output
    for text in (
        "20 planned = 19 stored + 1 errors",
        "4 x 8 x 8 float16, 512 bytes an image",
        "verified",
        plan.fingerprint,
        "[decode] [red]torn[/red]",
    ):
        assert text in result.output
    html = page.read_text()
    assert "20 planned = 19 stored + 1 errors" in html and "data:image/png;base64," in html
    assert "[red]torn[/red]" in html
    picture = Image.open(io.BytesIO((tmp_path / "latents.png").read_bytes()))
    assert picture.width > 1000


def test_damage_is_named_and_the_exit_status_says_so(tmp_path, photographs):
    store = make_store(tmp_path / "store", photographs)
    commit(str(store), open_plan(str(store)), {"seconds": 2.0, "shards_encoded": 3})
    os.truncate(store / "shards" / "00000001.parquet", 50)
    result = run(str(store), "--verify")
    assert result.exit_code == 1
    assert "problem: shards/00000001.parquet has 50 bytes" in result.output


def test_an_unfinished_store_says_how_to_finish_it(tmp_path, photographs):
    store = make_store(tmp_path / "store", photographs)
    (store / "shards" / "00000000.parquet").unlink()
    result = run(str(store))
    assert (
        result.exit_code == 0 and "2 of 3" in result.output and "same precompute" in result.output
    )
    assert run(str(store), "--verify").exit_code == 1


def test_a_checkpoint_shows_its_config_and_what_it_was_trained_with(tmp_path):
    model = FeatureAutoencoder(
        AutoencoderConfig(
            feature_dim=24,
            latent_dim=6,
            grid=(4, 4),
            encoder_num_heads=2,
            encoder_head_dim=8,
            decoder_depth=1,
            decoder_num_heads=2,
        )
    )
    checkpoint.save(tmp_path / "a.safetensors", model, {"backbone": "dinov2_vits14:0a1b"})
    result = run(str(tmp_path / "a.safetensors"))
    assert result.exit_code == 0, result.output
    assert "dinov2_vits14:0a1b" in result.output and "latent_dim" in result.output
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert f"{decoder:,}" in result.output
