"""The benchmarks' own functions, small: what they print is only as good as these."""

from __future__ import annotations

import functools
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from benchmarks import device, layers, protocol_images, protocols, scale, store
from benchmarks.environment import run
from benchmarks.processor_time import seconds_by
from fae.pipelines.config import validate_recipe
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.training.requirements import memory_of
from tests.tiny import SMALLEST_BACKBONE, TINY, wait_for


def test_a_process_is_full_where_its_fit_says_that_it_is_busy_all_the_time():
    actors, rates = [8, 16, 64, 256], [8.0, 16.0, 6.4, 25.6]
    busy = [0.05 + (0.002 + 1e-5 * n) * rate for n, rate in zip(actors, rates, strict=True)]
    found = scale.fit(actors, rates, busy)
    assert found == pytest.approx((0.05, 0.002, 1e-5))
    gpus = scale.full_at(*found, service=1.5)
    assert 0.05 + (0.002 + 1e-5 * gpus) * gpus / 1.5 == pytest.approx(1.0)
    assert scale.full_at(0.1, 0.003, 0.0, 1.5) == pytest.approx(450)


def test_what_the_directory_costs_is_told_apart_by_shards_and_by_actors():
    actors, rates = [8, 64, 128, 256], [8.0, 6.4, 12.0, 11.0]
    busy = [0.01 + 0.002 * rate + 1e-4 * n for n, rate in zip(actors, rates, strict=True)]
    assert scale.fit_directory(actors, rates, busy) == pytest.approx((0.01, 0.002, 1e-4))


def test_a_made_up_store_of_many_shards_is_planned_committed_and_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "FOOTERS", 20)
    monkeypatch.setattr("fae.pipelines.latents.manifest.SHARDS_AT_ONCE", 16)
    monkeypatch.setattr("fae.pipelines.latents.plan.PLAN_GROUPS", 7)
    results = {name: step() for name, step in scale.steps_of(str(tmp_path), 50)}
    assert results["list what is missing of none"] == list(range(50))
    assert results["list what is missing of all"] == []
    manifest = results["commit, the footers given"]
    assert manifest["stored"] == 50
    assert results["read the manifest"] == manifest


def test_a_written_store_reads_back_and_a_manifest_alone_opens(tmp_path):
    store.write_store(str(tmp_path), 1024, (2, 2, 2))
    assert verify_store(str(tmp_path)) == []
    for read in (store.read_files, store.read_arrow, store.read_epoch):
        assert store.timed(read, str(tmp_path), cached=False) > 0
    store.write_manifest(str(tmp_path), 2000)
    opened = LatentStore.open(str(tmp_path))
    assert len(opened) == 2000
    assert [entry["rows"] for entry in opened.manifest["shards"]] == [512, 512, 512, 464]


def test_the_mixtures_velocity_is_the_mean_over_what_led_to_a_point():
    mixture = protocols.Mixture(3, 2, seed=1)
    labels = torch.arange(3_000_000) % 3
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(3_000_000, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    data, noise, t = mixture.draw(labels, draws[0]), draws[1], 0.6
    x = (1 - t) * data + t * noise
    for label in (1, mixture.null):
        near = (x.abs() < 0.15).all(1) & ((labels == label) | (label == mixture.null))
        expected = (noise - data)[near].mean(0)
        found = mixture.velocity(torch.zeros(1, 2), torch.tensor([t]), torch.tensor([label]))[0]
        assert torch.allclose(found, expected, atol=0.04), (found, expected)


def test_a_trained_velocity_stands_in_for_the_exact_one():
    mixture = protocols.Mixture(3, 4)
    velocity = protocols.trained(mixture, 2, batch=8)
    name, value = next(iter(protocols.rows(mixture, velocity, 30)))
    assert name == "drawn from the mixture" and value > 0
    assert velocity(torch.zeros(5, 4), torch.full((5,), 0.5), torch.arange(5) % 4).shape == (5, 4)


def test_every_row_of_protocols_is_another_sampler_that_the_recipe_takes():
    rows = {**protocol_images.protocols(50), **protocol_images.methods(50)}
    sections = [
        validate_recipe({"sample": {"num_steps": 50, **keys}}, source=name).sample.model_dump()
        for name, keys in rows.items()
    ]
    assert all(a != b for i, a in enumerate(sections) for b in sections[:i])


def test_encoding_is_measured_at_more_batch_sizes_than_torch_compiles_a_function_for(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(device, "seconds", lambda work, *_: work() or 1.0)
    monkeypatch.setattr(device, "matrix_rate", lambda *_: 1e12)
    recipe = load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE])
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = device.encode(recipe, [2, 3], torch.device("cpu"))
    assert [row[1:3] for row in rows] == [["2", "no"], ["3", "no"], ["2", "yes"], ["3", "yes"]]
    assert counter.frame_count == 2


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["dit", "starflow"])
def test_the_generators_of_the_papers_size_train_on_a_gpu_of_80_gb(kind):
    keys = [f"generator.kind={kind}", "generator.training.use_gpu=true"]
    recipe = load_recipe("photos-dinov2s", [*device.PAPER_TRAIN, *device.BF16, *keys])
    assert sum(memory_of(recipe, "generator").step.values()) < 70e9


@pytest.mark.integration
def test_a_row_of_the_table_of_layers_tells_black_from_white(tmp_path):
    random = np.random.default_rng(0)
    for name, light in (("black", 0), ("white", 200)):
        (tmp_path / name).mkdir()
        for index in range(24):
            noise = random.integers(0, 55, (28, 28, 3))
            Image.fromarray((noise + light).astype(np.uint8)).save(tmp_path / name / f"{index}.png")
    backbone = ["name=vit_tiny_patch16_224", "weights=random", "image_size=32", "layers=2"]
    keys = [f"backbone.{key}" for key in backbone]
    recipe = load_recipe(layers.RECIPE, [*keys, "data.key_column=null"])
    images = layers.Images(recipe, str(tmp_path), 48)
    steps = Namespace(autoencoder_steps=20, decoder_steps=60, finetune_steps=20)
    cells = layers.measure(recipe, images, images, steps)
    assert len(cells) == layers.COLUMNS.count("|")
    grey = 20 * np.log10(1 / 0.4)  # [dB]: the same grey for both, which are 0.4 away from it
    assert float(cells[4].split(" dB")[0]) > grey + 3
    assert cells[6] == "100.0%, 100.0%"


def test_a_users_error_ends_a_benchmark_with_its_message(capsys):
    def main():
        load_recipe("no-such-recipe")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert "no-such-recipe" in capsys.readouterr().err


def test_processor_time_is_told_apart_by_what_a_process_is():
    spin = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    before = seconds_by(str)
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE) as child:
        wait_for(lambda: seconds_by(str)["other"] - before["other"] >= 0.25)
        assert seconds_by(str)["driver"] >= before["driver"] > 0
        child.communicate(b"\n")
