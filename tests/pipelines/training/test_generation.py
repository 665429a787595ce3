"""From a latent store to pictures with real Ray.

Training survives a SIGKILL, and samples are the same however they are drawn.
"""

import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.data.account import Account
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import build_pixel_decoder
from fae.pipelines.sampling.grid import draw_grid
from fae.pipelines.sampling.image_sampler import ImageSampler
from fae.pipelines.sampling.sample_job import sample
from fae.pipelines.storage.claims import StoreMismatch
from fae.pipelines.training.generator import train_generator
from fae.pipelines.training.pixel_decoder import train_pixel_decoder
from fae_core import checkpoint
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.checkpoint import CheckpointError
from tests.here import leave_ray_out, train_here
from tests.tiny import ROOT, TINY, save_autoencoder, save_decoders, wait_for_checkpoint

SHAPE = (4, 4, 4)
NUM_ROWS = 48


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict[str, str]:
    """Untrained autoencoder and pixel decoder that belong together."""
    folder = tmp_path_factory.mktemp("decoders")
    save_decoders(folder, SHAPE, 32)
    return {name: str(folder / f"{name}.safetensors") for name in ("autoencoder", "pixel_decoder")}


@pytest.fixture(scope="module")
def store(decoders, tmp_path_factory) -> Path:
    """Latents of two classes with different means, made by the autoencoder of `decoders`."""
    from fae.pipelines.data.records import ImageRecord

    folder = tmp_path_factory.mktemp("latents")
    records = [ImageRecord(f"{i:03d}", f"/x/{i}", label=i % 2) for i in range(NUM_ROWS)]
    parts = {"autoencoder weights": checkpoint.load(decoders["autoencoder"]).weights_sha256}
    account = Account("x", class_names=["cat", "dog"]).to_dict()
    plan = ensure_plan(str(folder), records, 16, parts, account)
    random = np.random.default_rng(0)
    for shard in range(plan.num_shards):
        rows = plan.shard(shard)
        sign = np.array([1.0 if r.label else -1.0 for r in rows])[:, None, None, None]
        values = {"mean": (random.normal(size=(len(rows), *SHAPE)) + sign).astype(np.float16)}
        write_shard(str(folder), shard, rows, list(range(len(rows))), values, [], plan.fingerprint)
    commit(str(folder), plan, {})
    return folder


def overrides(store: Path, folder: Path, kind: str, *more: str) -> list[str]:
    network = (
        ["generator.width=64", "generator.layers=[1,1]"]
        if kind == "starflow"
        else ["generator.width=32", "generator.depth=2", "generator.num_heads=2"]
    )
    return [
        "run=test", f"storage={folder}", f"latents={store}", f"generator.kind={kind}", *network,
        "generator.num_classes=2", "generator.size=S", "generator.training.steps=8",
        "generator.training.batch_size=8", "generator.training.accumulation=2",
        "generator.training.precision=fp32", "generator.training.learning_rate=1e-3",
        "generator.training.log_every=2", "generator.training.checkpoint_every=2",
        "generator.training.validate_every=4", "generator.training.ema_decay=0.9",
        "sample.num_steps=4", "tracking.enabled=false", *more,
    ]  # fmt: skip


def start(network: str, values: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "fae", "train", network, "photos-dinov2s", *values],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_at_first_checkpoint(network: str, values: list[str], folder: Path) -> None:
    process = start(network, values)
    wait_for_checkpoint(process, folder / "test")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "test" / "result.json").exists()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).module.state_dict()


@pytest.fixture(scope="module")
def local_ray():
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def train_once(local_ray, store, tmp_path_factory) -> Callable[[str], Path]:
    """Trains a generator of a kind, once however the tests are ordered."""

    @functools.cache
    def train(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        train_generator(load_recipe("photos-dinov2s", overrides(store, folder, kind)))
        return folder / "test" / "generator.safetensors"

    return train


@pytest.fixture(scope="module", params=["dit", "starflow"])
def trained(request, train_once) -> tuple[str, Path]:
    return request.param, train_once(request.param)


@pytest.mark.faults
@pytest.mark.integration
@pytest.mark.parametrize("trained", ["dit"], indirect=True)
def test_a_killed_generator_ends_with_the_same_parameters_bit_for_bit(trained, store, tmp_path):
    kind, path = trained
    values = overrides(store, tmp_path, kind)
    kill_at_first_checkpoint("generator", values, tmp_path)
    train_generator(load_recipe("photos-dinov2s", values))
    expected, actual = weights(path), weights(tmp_path / "test" / "generator.safetensors")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.integration
@pytest.mark.parametrize(
    ("trained", "parallel"),
    [("dit", "ddp"), pytest.param("starflow", "fsdp", marks=pytest.mark.faults)],
    indirect=["trained"],
)
def test_two_workers_train_the_same_generator_as_one(trained, store, tmp_path, parallel):
    kind, path = trained
    two = (
        "generator.training.num_workers=2", "generator.training.cpus_per_worker=0.5",
        f"generator.training.parallel={parallel}", "generator.training.checkpoint_parts=true",
        "generator.training.checkpoint_background=true",
    )  # fmt: skip
    train_generator(load_recipe("photos-dinov2s", overrides(store, tmp_path, kind, *two)))
    expected, actual = weights(path), weights(tmp_path / "test" / "generator.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert list((tmp_path / "test" / "checkpoints").glob("step_000000008-2-of-2-*.part"))
    if parallel == "fsdp":  # one worker goes on from the last checkpoint but one of both
        (tmp_path / "test" / "result.json").unlink()
        (tmp_path / "test" / "checkpoints" / "step_000000008.json").unlink()
        train_generator(load_recipe("photos-dinov2s", overrides(store, tmp_path, kind)))
        actual = weights(tmp_path / "test" / "generator.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.integration
def test_a_generator_carries_the_stores_statistics_and_fingerprints(trained, store, decoders):
    loaded = checkpoint.load(trained[1])
    manifest = json.loads((store / "manifest.json").read_text())
    assert loaded.class_names == ("cat", "dog")
    assert loaded.fingerprints["latents"] == manifest["fingerprint"]
    assert (
        loaded.fingerprints["autoencoder"]
        == checkpoint.load(decoders["autoencoder"]).weights_sha256
    )
    mean = manifest["statistics"]["mean"]["mean"]
    np.testing.assert_allclose(loaded.module.latent_mean.numpy(), mean, rtol=1e-6)


def sampling(path: Path, decoders: dict[str, str], output: Path, *more: str) -> list[str]:
    return [
        f"generator.checkpoint={path}", f"autoencoder.checkpoint={decoders['autoencoder']}",
        f"pixel_decoder.checkpoint={decoders['pixel_decoder']}", f"output={output}",
        "sample.num_images=22", "sample.num_steps=4", "sample.shard_size=4", "sample.batch_size=4",
        "sample.guidance=[{start: 1.0, end: 0.3, scale: 2.0}]", "sample.flow_guidance=1.0", *more,
    ]  # fmt: skip


def pictures(output: Path) -> np.ndarray:
    return np.load(output / "samples.npz")["arr_0"]


@pytest.fixture(scope="module")
def drawn(trained, decoders, tmp_path_factory) -> Path:
    """Samples that no Ray has drawn."""
    output = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        sample(load_recipe("photos-dinov2s", sampling(trained[1], decoders, output)), False)
    return output


@pytest.mark.integration
def test_every_format_holds_the_same_pictures(drawn):
    images = pictures(drawn)
    assert images.shape == (22, 32, 32, 3) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(22, -1), axis=0)) == 22
    tables = [pq.read_table(p) for p in sorted((drawn / "shards").glob("*.parquet"))]
    indices = [i for table in tables for i in table["index"].to_pylist()]
    labels = [i for table in tables for i in table["label"].to_pylist()]
    assert indices == list(range(22)) and labels == [i % 2 for i in range(22)]
    blobs = [blob for table in tables for blob in table["image"].to_pylist()]
    for i, blob in enumerate(blobs):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(blob))), images[i])
        assert (drawn / "png" / f"{i % 2:04d}" / f"{i:08d}.png").read_bytes() == blob
    assert json.loads((drawn / "manifest.json").read_text())["stored"] == 22


@pytest.mark.integration
@pytest.mark.parametrize(
    "trained", ["dit", pytest.param("starflow", marks=pytest.mark.faults)], indirect=True
)
def test_two_actors_and_a_restart_draw_the_same_pictures(trained, decoders, drawn, tmp_path):
    values = sampling(
        trained[1], decoders, tmp_path, "sample.num_actors=2", "sample.cpus_per_actor=0.5"
    )
    sample(load_recipe("photos-dinov2s", values), False)
    assert np.array_equal(pictures(tmp_path), pictures(drawn))
    # What a killed job leaves: some shards, no manifest.
    for name in ("manifest.json", "samples.npz", "shards/00000002.parquet"):
        (tmp_path / name).unlink()
    kept = (tmp_path / "shards" / "00000001.parquet").stat().st_mtime_ns
    manifest = sample(load_recipe("photos-dinov2s", values), False)
    assert manifest["run"]["shards_drawn"] == 1
    assert (tmp_path / "shards" / "00000001.parquet").stat().st_mtime_ns == kept
    assert np.array_equal(pictures(tmp_path), pictures(drawn))


@pytest.mark.integration
def test_another_batch_size_changes_no_pixel_by_more_than_one(trained, decoders, drawn, tmp_path):
    recipe = load_recipe(
        "photos-dinov2s", sampling(trained[1], decoders, tmp_path, "sample.batch_size=3")
    )
    sampler = ImageSampler(recipe)
    images = sampler(list(range(22)), sampler.labels(list(range(22))))
    difference = np.abs(images.astype(int) - pictures(drawn).astype(int))
    assert difference.max() <= 1


@pytest.mark.integration
def test_samples_of_other_settings_are_refused_and_named(trained, decoders, drawn):
    values = sampling(trained[1], decoders, drawn, "seed=1")
    with pytest.raises(StoreMismatch, match="seed: 0 there, 1 now"):
        sample(load_recipe("photos-dinov2s", values), False)


@pytest.mark.integration
def test_decoders_of_other_latents_are_refused(trained, decoders, tmp_path):
    other = FeatureAutoencoder(
        AutoencoderConfig(24, SHAPE[0], SHAPE[1:], encoder_num_heads=2, encoder_head_dim=8,
                          decoder_depth=1, decoder_num_heads=2)
    )  # fmt: skip
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, other, {"backbone": "tiny:0", "image_size": "32"})
    values = sampling(trained[1], {**decoders, "autoencoder": str(path)}, tmp_path)
    with pytest.raises(CheckpointError, match="not the autoencoder of these latents"):
        ImageSampler(load_recipe("photos-dinov2s", values))


@pytest.mark.integration
def test_the_grid_has_a_row_a_class_and_a_column_a_scale(trained, decoders, tmp_path):
    recipe = load_recipe("photos-dinov2s", sampling(trained[1], decoders, tmp_path))
    draw_grid(recipe, str(tmp_path / "plain.png"), columns=3)
    draw_grid(recipe, str(tmp_path / "scales.png"), scales=(0.5, 2.0))
    plain, scales = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "scales"))
    assert plain.width > plain.height
    assert scales.width != plain.width


def test_a_class_that_the_generator_lacks_is_refused(trained_off_ray, decoders, tmp_path):
    values = sampling(trained_off_ray, decoders, tmp_path, "sample.classes=[0,7]")
    with pytest.raises(RecipeError, match="7 is none of the generator's 2 classes"):
        ImageSampler(load_recipe("photos-dinov2s", values))


@pytest.fixture
def trained_off_ray(decoders, tmp_path) -> Path:
    from fae_core.generators.dit import DiT, DiTConfig

    model = DiT(DiTConfig(SHAPE[0], SHAPE[1:], width=32, depth=1, num_heads=2, num_classes=2))
    marks = {"autoencoder": checkpoint.load(decoders["autoencoder"]).weights_sha256}
    checkpoint.save(tmp_path / "generator.safetensors", model, marks)
    return tmp_path / "generator.safetensors"


def test_the_rows_of_a_grid_have_the_names_of_their_classes(trained_off_ray, decoders, tmp_path):
    loaded = checkpoint.load(trained_off_ray)
    names = ("goldfish", "volcano, a mountain that is on fire")
    checkpoint.save(tmp_path / "named.safetensors", loaded.module, loaded.fingerprints, names)
    widths = []
    for path in (trained_off_ray, tmp_path / "named.safetensors"):
        recipe = load_recipe("photos-dinov2s", sampling(path, decoders, tmp_path))
        draw_grid(recipe, str(tmp_path / "new folder" / "grid.png"), columns=3)
        widths.append(Image.open(tmp_path / "new folder" / "grid.png").width)
    assert widths[1] > widths[0] + 150


def test_what_is_missing_is_asked_for():
    with pytest.raises(RecipeError, match="latents=STORE"):
        train_generator(load_recipe("photos-dinov2s", ["run=x"]))
    with pytest.raises(RecipeError, match="generator.checkpoint"):
        ImageSampler(load_recipe("photos-dinov2s"))
    with pytest.raises(RecipeError, match="start_from"):
        train_pixel_decoder(
            load_recipe("photos-dinov2s", ["run=x", "pixel_decoder.stage=finetune"])
        )


def test_a_size_that_there_is_not_is_refused_before_anything_starts(store, tmp_path):
    values = overrides(store, tmp_path, "dit", "generator.size=XXL")
    with pytest.raises(RecipeError, match="there are S, B, L, XL"):
        train_generator(load_recipe("photos-dinov2s", values))
    assert not (tmp_path / "test").exists()


def pixel_overrides(photographs: Path, folder: Path, *more: str) -> list[str]:
    return [
        "run=test", f"storage={folder}", f"data.path={photographs}", "data.validation_fraction=0.1",
        "data.limit=40", "backbone.name=vit_tiny_patch16_224", "backbone.weights=random",
        "backbone.image_size=64", "image_size=64",
        "pixel_decoder.width=32", "pixel_decoder.depth=2", "pixel_decoder.num_heads=2",
        "pixel_decoder.statistics_images=8", "pixel_decoder.losses.perceptual=backbone",
        "pixel_decoder.losses.discriminator_start=1", "pixel_decoder.losses.adversarial_start=2",
        "pixel_decoder.losses.discriminator=backbone", "pixel_decoder.losses.adaptive=true",
        "pixel_decoder.training.steps=6", "pixel_decoder.training.batch_size=4",
        "pixel_decoder.training.accumulation=2", "pixel_decoder.training.warmup_steps=2",
        "pixel_decoder.training.learning_rate=1e-3", "pixel_decoder.training.precision=fp32",
        "pixel_decoder.training.log_every=1", "pixel_decoder.training.checkpoint_every=3",
        "pixel_decoder.training.ema_decay=0.9", "tracking.enabled=false", *more,
    ]  # fmt: skip


@pytest.mark.integration
def test_finetuning_with_noise_is_the_same_in_micro_batches_of_any_size_and_resumed(
    photographs, tmp_path, monkeypatch
):
    leave_ray_out(monkeypatch)
    train_here(monkeypatch)
    autoencoder, first = (tmp_path / f"{name}.safetensors" for name in ("autoencoder", "first"))
    more = [
        *TINY, f"autoencoder.checkpoint={save_autoencoder(autoencoder)}",
        f"pixel_decoder.start_from={first}", "pixel_decoder.stage=finetune",
        "pixel_decoder.latent_noise=2", "pixel_decoder.losses.adversarial_weight=0",
        "pixel_decoder.training.steps=3", "pixel_decoder.training.checkpoint_every=2",
    ]  # fmt: skip
    recipe = load_recipe("photos-dinov2s", pixel_overrides(photographs, tmp_path, *more))
    spec = backbone_of(recipe).spec
    decoder = build_pixel_decoder(recipe.pixel_decoder, spec, recipe.image_size)
    torch.nn.init.normal_(decoder.output.weight, std=0.2)
    checkpoint.save(first, decoder, checkpoint.load(autoencoder).fingerprints)
    trained = []
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        values = [*more, f"pixel_decoder.training.accumulation={accumulation}"]
        recipe = load_recipe("photos-dinov2s", pixel_overrides(photographs, folder, *values))
        train_pixel_decoder(recipe)
        trained.append(weights(folder / "test" / "pixel_decoder.safetensors"))
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, rtol=1e-3, atol=1e-4)
    # Resumed at step 2.
    (folder / "test" / "result.json").unlink()
    (folder / "test" / "pixel_decoder.safetensors").unlink()
    train_pixel_decoder(recipe)
    for name, expected in weights(folder / "test" / "pixel_decoder.safetensors").items():
        assert torch.equal(trained[1][name], expected), name


@pytest.mark.faults
@pytest.mark.integration
def test_a_killed_pixel_decoder_with_its_adversary_ends_at_the_same_bits(
    photographs, local_ray, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = train_pixel_decoder(load_recipe("photos-dinov2s", pixel_overrides(photographs, whole)))
    assert {"psnr", "ssim", "backbone_distance"} <= result.metrics.keys()
    values = pixel_overrides(photographs, killed)
    kill_at_first_checkpoint("pixel-decoder", values, killed)
    train_pixel_decoder(load_recipe("photos-dinov2s", values))
    expected, actual = (weights(f / "test" / "pixel_decoder.safetensors") for f in (whole, killed))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    states = [
        torch.load(sorted((f / "test" / "checkpoints").iterdir())[-1], weights_only=True)[
            "networks"
        ]
        for f in (whole, killed)
    ]
    adversaries = [state["adversary"]["weights"] for state in states]
    assert any("lecam" in name for name in adversaries[0])
    for name, value in adversaries[0].items():
        assert torch.equal(value, adversaries[1][name]), name
