"""The chain of a generator of text, from captioned images to the page, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fae.pipelines.chain.chain_job import run_chain
from fae.pipelines.config.recipe import load_recipe
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


@pytest.mark.integration
def test_captioned_images_become_scored_samples_of_their_captions(captioned, tmp_path, monkeypatch):
    leave_ray_out(monkeypatch)
    train_here(monkeypatch)
    monkeypatch.setattr("fae.pipelines.chain.chain_job.start_ray", lambda: None)
    monkeypatch.setattr("fae.pipelines.chain.chain_job._cluster_resources", lambda: {"CPU": 1.0})
    places = [
        f"data.path={captioned}", f"storage={tmp_path / 'runs'}", "tracking.enabled=false",
        "generator.kind=mmdit", f"text.weights={save_text_encoder(tmp_path / 'text')}",
        "text.max_length=8", "sample.num_images=36", "sample.shard_size=18", "chain.finetune=false",
    ]  # fmt: skip
    metrics = run_chain(load_recipe(RECIPE, places))
    assert metrics["samples"] == {"stored": 36.0}
    assert metrics["evaluation"]["num_images"] == 36
    (run,) = (tmp_path / "runs").glob("generator-*")
    assert checkpoint.load(run / "generator.safetensors").kind == "mmdit"
    (samples,) = (tmp_path / "runs").glob("samples-*")
    prompts = json.loads((samples / "manifest.json").read_text())["prompts"]
    assert prompts == [f"a {list(COLORS)[index % 3]} house" for index in range(36)]
    (report,) = (tmp_path / "runs").glob("report-*")
    assert (report / "samples-grid.png").is_file()
    assert set(run_chain(load_recipe(str(report / "recipe.yaml")))) == set(metrics)
