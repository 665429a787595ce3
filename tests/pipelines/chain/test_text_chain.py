"""The chain of a generator of text, from captioned images to the page, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fae.pipelines.chain.chain_job import run_chain
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.latents.plan import open_plan
from fae_core import checkpoint
from tests.here import leave_ray_out, train_here
from tests.tiny import save_text_encoder

RECIPE = str(Path(__file__).parents[2] / "tiny_chain.yaml")
COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def captioned(tmp_path) -> Path:
    """36 pictures with metadata.jsonl, as examples/fluent_emoji.py lays them out."""
    folder = tmp_path / "images"
    folder.mkdir()
    random, lines = np.random.default_rng(0), []
    for index in range(36):
        color = list(COLORS)[index % 3]
        pixels = np.clip(random.normal(COLORS[color], 30, (28, 28, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": f"a {color} house"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_ray_out(monkeypatch)
    train_here(monkeypatch)
    monkeypatch.setattr("fae.pipelines.chain.chain_job.start_ray", lambda: None)
    monkeypatch.setattr("fae.pipelines.chain.chain_job._cluster_resources", lambda: {"CPU": 1.0})


@pytest.mark.integration
def test_captioned_images_become_scored_samples_of_their_captions(captioned, tmp_path):
    places = [
        f"data.path={captioned}", f"storage={tmp_path / 'runs'}", "tracking.enabled=false",
        "generator.kind=mmdit", f"text.weights={save_text_encoder(tmp_path / 'text')}",
        "text.max_length=8", "sample.num_images=36", "sample.shard_size=18", "chain.finetune=false",
        "text.states=stored",
    ]  # fmt: skip
    metrics = run_chain(load_recipe(RECIPE, places))
    assert metrics["samples"] == {"stored": 36.0}
    assert metrics["evaluation"]["num_images"] == 36
    assert metrics["text-states"] == {"stored": 36.0, "errors": 0.0, "tokens": 4.0 * 36}
    (run,) = (tmp_path / "runs").glob("generator-*")
    assert checkpoint.load(run / "generator.safetensors").kind == "mmdit"
    (samples,) = (tmp_path / "runs").glob("samples-*")
    prompts = json.loads((samples / "manifest.json").read_text())["prompts"]
    assert prompts == [f"a {list(COLORS)[index % 3]} house" for index in range(36)]
    (report,) = (tmp_path / "runs").glob("report-*")
    assert (report / "samples-grid.png").is_file()
    assert set(run_chain(load_recipe(str(report / "recipe.yaml")))) == set(metrics)


@pytest.mark.integration
def test_the_emoji_recipe_goes_from_the_shipped_images_to_the_scored_page(tmp_path):
    """Its own networks and encoders, with two steps of each training."""
    small = [
        f"{network}.training.{setting}"
        for network in ("autoencoder", "pixel_decoder", "generator")
        for setting in ("steps=2", "batch_size=4", "warmup_steps=1", "threads_per_worker=1")
    ]
    values = [
        "data.path=shipped:emoji-images/train", "data.limit=8", "evaluate.limit=8",
        "evaluate.reference=shipped:emoji-images/heldout", f"storage={tmp_path}",
        "tracking.enabled=false", "chain.finetune=false", "text.states=stored",
        "sample.num_images=8", "sample.num_steps=2", *small,
    ]  # fmt: skip
    metrics = run_chain(load_recipe("emoji-dinov2s", values))
    assert metrics["latents"]["stored"] == metrics["text-states"]["stored"] == 8
    assert np.isfinite(metrics["evaluation"]["frechet_backbone"])
    (latents,) = tmp_path.glob("latents-*")
    assert all(r.uri.startswith("shipped:") for r in open_plan(str(latents)).shard(0))
    (report,) = tmp_path.glob("report-*")
    page = (report / "report.html").read_text()
    assert "frechet_backbone" in page and "text-states" in page
    assert page.count("data:image/png;base64,") == 2  # the generator's preview, the samples
