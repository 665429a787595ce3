"""`--probe`: what it measures, and the time that it makes of it."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.doctor import speed
from fae_core.errors import UserError

SMALL = [
    "backbone.weights=random", "data.path=shipped:emoji-images/train", "run=r",
    "autoencoder.training.batch_size=4", "autoencoder.training.steps=100",
    "autoencoder.training.num_workers=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(speed, "PROBE_SECONDS", 0.01)
    yield
    torch.set_num_threads(threads)


def test_the_slowest_part_and_all_of_its_processes_decide_the_time():
    found = speed.Speed("9,000 images", 9000, {"encoding": (25.0, 2), "decoding": (20.0, 3)})
    assert found.seconds == 180.0  # 50 images/s together
    assert speed.speed_text(found).splitlines()[1:] == [
        "       25.0  images/s, encoding, 2 at once",
        "       20.0  images/s, decoding, 3 at once",
        "9,000 images: about 3 min",
    ]


def test_a_training_is_measured_by_its_own_steps():
    found = speed.speed_of(load_recipe("emoji-dinov2s", SMALL), "autoencoder")
    (rate, workers), (decoded, _) = found.rates["training"], found.rates["decoding"]
    assert found.num_images == 400 and workers == 2 and 0 < rate < decoded
    assert found.seconds == 400 / (2 * rate)


def test_the_command_prints_it_and_runs_nothing(monkeypatch):
    # The estimate of memory has tests of its own, and takes longer.
    monkeypatch.setattr("fae.pipelines.doctor.memory.precompute_memory", lambda recipe: [])
    batch = "precompute.batch_size=2"
    words = ["precompute", "emoji-dinov2s", *SMALL[:2], batch, "output=never-written", "--probe"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "nothing was run" in result.output and "images/s, encoding" in result.output
    assert result.output.splitlines()[-1].startswith("93 images: about ")


def test_a_recipe_for_gpus_is_not_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wanted = load_recipe("emoji-dinov2s", [*SMALL, "autoencoder.training.use_gpu=true"])
    with pytest.raises(UserError, match="has no GPU"):
        speed.speed_of(wanted, "autoencoder")
