"""Nothing is a special number: every stage with none, one and all of its images bad, a last shard
of one image, shards without one, and a source of one image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.sources import list_images
from fae.pipelines.evaluation.errors import EvaluationError, ProbeError
from fae.pipelines.evaluation.evaluate_job import evaluate
from fae.pipelines.evaluation.probe_job import probe
from fae.pipelines.latents.export_layouts import ExportError, export
from fae.pipelines.latents.filling import TooManyErrors
from fae.pipelines.latents.inspection import inspect
from fae.pipelines.latents.precompute_job import precompute
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder, build_pixel_decoder
from fae.pipelines.sampling.sample_job import sample
from fae.pipelines.sampling.sample_store import read_samples
from fae.pipelines.storage.claims import StoreError
from fae.pipelines.training import autoencoder as autoencoder_training
from fae.pipelines.training import pixel_decoder as pixel_decoder_training
from fae.pipelines.training.autoencoder import autoencoder_loss
from fae.pipelines.training.feature_cache import computed_features
from fae.pipelines.training.feature_statistics import (
    fit_statistics,
    read_baseline,
    read_statistics,
)
from fae.pipelines.training.generator import generator_loss
from fae.pipelines.training.image_feed import image_batches, image_feed
from fae.pipelines.training.job import TrainingError
from fae.pipelines.training.latent_feed import latent_feed
from fae.pipelines.training.pixel_objective import Objective
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import train_step
from fae_core import checkpoint
from fae_core.generators.dit import DiT, DiTConfig
from tests.tiny import SMALLEST_BACKBONE, TINY

pytestmark = pytest.mark.usefixtures("without_ray")
CPU = torch.device("cpu")
SETS = pytest.mark.parametrize(
    ("num_images", "num_bad"), [(9, 0), (9, 1), (9, 5), (9, 9), (1, 0), (1, 1)]
)


def recipe_of(*overrides: object) -> Recipe:
    fixed = ["precompute.shard_size=4", "precompute.precision=fp32", "probe.num_neighbors=2"]
    return load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE, *fixed, *map(str, overrides)])


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Overrides by network: untrained ones that belong together."""
    folder, recipe = tmp_path_factory.mktemp("networks"), recipe_of()
    backbone = backbone_of(recipe)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    small = recipe_of(
        "pixel_decoder.width=24", "pixel_decoder.depth=1", "pixel_decoder.num_heads=2"
    )
    decoder = build_pixel_decoder(small.pixel_decoder, backbone.spec, recipe.image_size)
    marks = backbone_fingerprints(recipe, backbone)
    sha256 = checkpoint.save(folder / "autoencoder.safetensors", autoencoder, marks)
    checkpoint.save(folder / "pixel_decoder.safetensors", decoder, marks)
    config = DiTConfig(8, backbone.grid, width=32, depth=1, num_heads=2, num_classes=2)
    generator, names = DiT(config), ("cat", "dog")
    checkpoint.save(folder / "generator.safetensors", generator, {"autoencoder": sha256}, names)
    return {
        name: f"{name}.checkpoint={folder / name}.safetensors"
        for name in ("autoencoder", "pixel_decoder", "generator")
    }


@pytest.fixture
def images(tmp_path: Path) -> Callable[[int, int], Path]:
    """Writes a folder of images in two class folders, the first of them bad, with two captions
    each."""

    def write(num_images: int, num_bad: int, name: str = "images") -> Path:
        folder, random, lines = tmp_path / name, np.random.default_rng(0), []
        for index in range(num_images):
            file = f"{'cat' if index % 2 else 'dog'}/{index}.png"
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(buffer, "PNG")
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"no image" if index < num_bad else buffer.getvalue())
            lines.append(json.dumps({"file_name": file, "text": ["one", f"two {index}"]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return folder

    return write


@SETS
def test_latents_of_any_number_are_stored_inspected_exported_and_trained_on(
    images, networks, tmp_path, num_images, num_bad
):
    output, source = tmp_path / "store", images(num_images, num_bad)
    places = (f"data.path={source}", f"output={output}", networks["autoencoder"])
    if num_bad:
        with pytest.raises(TooManyErrors, match=f"of {num_images} images could not be encoded"):
            precompute(recipe_of(*places, "precompute.max_error_rate=0"), show_progress=False)
    recipe = recipe_of(*places, "precompute.max_error_rate=1")
    manifest, good = precompute(recipe, show_progress=False), num_images - num_bad
    counts = [manifest[name] for name in ("planned", "stored", "errors")]
    assert counts == [num_images, good, num_bad]
    assert verify_store(str(output)) == [] and inspect(str(output), verify=True)
    store = LatentStore.open(str(output))
    captions = [c for i in range(store.num_shards) for c in store.read_shard(i)["captions"]]
    assert len(captions) == good and all(len(several) == 2 for several in captions)
    if not good:
        with pytest.raises(ExportError, match="nothing to export"):
            export(str(output), "npy", str(tmp_path / "export"))
        with pytest.raises(StoreError, match="stores no latents"):
            store.reader(4, seed=0)
        return
    assert export(str(output), "npy", str(tmp_path / "export"))["rows"] == good
    sizes = ["generator.size=S", "generator.num_classes=2", "generator.training.batch_size=4"]
    section = recipe_of(*sizes, "generator.flip=false").generator
    first, second = islice(latent_feed(store, section, 0)(0, 0, 1, CPU), 2)
    assert first["latents"].shape == (4, *store.latent_shape) and first.weight == 1.0
    model = DiT(DiTConfig(8, store.latent_shape[1:], width=32, depth=1, num_heads=2, num_classes=2))
    spread = torch.from_numpy(store.stats.std).float().clamp_min(1e-6)
    model.set_latent_stats(torch.from_numpy(store.stats.mean).float(), spread)
    assert torch.isfinite(generator_loss(section, model, second)["loss"])


@SETS
def test_a_training_on_any_number_of_images_steps_and_counts_the_bad_ones(
    images, num_images, num_bad
):
    source = images(num_images, num_bad)
    recipe = recipe_of(f"data.path={source}", "autoencoder.training.batch_size=3",
                       "autoencoder.training.precision=fp32")  # fmt: skip
    section, backbone = recipe.autoencoder, backbone_of(recipe)
    records = list_images(recipe.data)
    batches = image_feed(records, recipe.data, recipe.image_size, 0, section.training)
    torch.manual_seed(0)
    model = build_autoencoder(section, backbone.spec)
    state = TrainState(model, section.training, None)

    def loss(wrapped: nn.Module, batch):
        return autoencoder_loss(section, 0, backbone, wrapped, batch)

    # Three steps of three images see each of nine images once, or one image nine times.
    failed = []
    for batch in islice(batches(0, 0, 1, CPU), 3):
        terms = train_step(state, model, loss, [batch], section.training)
        assert torch.isfinite(terms["loss"])
        assert batch.weight == pytest.approx((3 - len(batch.errors)) / 3)
        failed += [error["key"] for error in batch.errors]
    assert len(failed) == num_bad * 9 // num_images
    of_worker = next(batches(0, 2, 3, CPU))  # more workers than images, where there is one
    assert len(of_worker.samples) == 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@SETS
def test_statistics_and_validations_of_any_number_of_images(
    images, networks, tmp_path, num_images, num_bad
):
    source = images(num_images, num_bad)
    recipe = recipe_of(f"data.path={source}", "pixel_decoder.losses.perceptual=none",
                       "pixel_decoder.losses.adversarial_weight=0")  # fmt: skip
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    run, size = str(tmp_path / "run"), recipe.image_size

    def fit() -> None:
        features = computed_features(records, recipe.data, size, backbone, "fp32")
        fit_statistics(features, backbone.dim, run, num_components=8)

    def held_out():
        return image_batches(records, recipe.data, size)

    autoencoder, decoder = (
        checkpoint.load(networks[name].partition("=")[2]).module
        for name in ("autoencoder", "pixel_decoder")
    )
    objective = Objective(recipe.pixel_decoder, 0, backbone, autoencoder, None, 0.4)
    validate_pixels = pixel_decoder_training._Validation(held_out, objective)
    with torch.no_grad():
        metrics, figure = validate_pixels(decoder, 1)
    assert metrics["num_images"] == num_images - num_bad
    assert (figure is None) == (num_images == num_bad)
    if num_images == num_bad:
        with pytest.raises(TrainingError, match="None of the first training images"):
            fit()
        return
    fit()
    _, std = read_statistics(run)
    assert torch.isfinite(std).all() and (std > 0).all()
    baseline = read_baseline(run)
    validate = autoencoder_training._Validation(held_out, backbone, baseline, "fp32")
    with torch.no_grad():
        metrics, figure = validate(autoencoder, 1)
    assert metrics["num_images"] == num_images - num_bad and figure is not None
    assert np.isfinite(list(metrics.values())).all()


def test_images_without_variance_train(tmp_path):
    for index in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{index}.png")
    recipe = recipe_of(f"data.path={tmp_path}", "autoencoder.training.precision=fp32")
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    features = computed_features(records, recipe.data, recipe.image_size, backbone, "fp32")
    fit_statistics(features, backbone.dim, str(tmp_path / "run"), num_components=8)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    model.set_feature_stats(*read_statistics(str(tmp_path / "run")))
    training = recipe.autoencoder.training.model_copy(update={"batch_size": 2})
    feed = image_feed(records, recipe.data, recipe.image_size, 0, training)
    batch = next(feed(0, 0, 1, CPU))
    assert torch.isfinite(autoencoder_loss(recipe.autoencoder, 0, backbone, model, batch)["loss"])


SCORES = "evaluate.scores=[frechet_backbone,precision_recall,kid,reconstruction]"
FEW = ["evaluate.features=backbone", "evaluate.num_neighbors=1", "evaluate.kid_subset_size=2",
       "evaluate.chunk_size=4", "evaluate.max_error_rate=1"]  # fmt: skip


@SETS
def test_scores_of_any_number_of_images(images, num_images, num_bad):
    sides = (f"evaluate.images={images(num_images, num_bad)}",
             f"evaluate.reference={images(num_images, 0, 'originals')}")  # fmt: skip
    good = num_images - num_bad
    if num_images == 1:
        with pytest.raises(EvaluationError, match="has 1 image"):
            evaluate(recipe_of(*sides, SCORES, *FEW), show_progress=False)
        sides = (*sides, "evaluate.scores=[reconstruction]", *FEW)
    else:
        sides = (*sides, SCORES, *FEW)
    if not good:
        with pytest.raises(EvaluationError, match="None of the 9 images|No pair of"):
            evaluate(recipe_of(*sides), show_progress=False)
        return
    scores = evaluate(recipe_of(*sides), show_progress=False)
    # What is left pairs with its own original, so nothing differs.
    assert scores["psnr"] == pytest.approx(120) and scores["ssim"] == pytest.approx(1)
    assert np.isfinite(list(scores.values())).all()
    assert scores["num_images"] == (good if num_images > 1 else 1)


@pytest.mark.parametrize("num_bad", [0, 1, 23, 24])
def test_probes_of_any_number_of_bad_images(images, networks, tmp_path, num_bad):
    recipe = recipe_of(f"data.path={images(24, num_bad)}", networks["autoencoder"],
                       f"probe.output={tmp_path / 'probe'}", "probe.max_error_rate=1",
                       "probe.batch_size=4")  # fmt: skip
    if num_bad < 2:
        scores = probe(recipe, show_progress=False)
        assert scores["num_train"] + scores["num_test"] + scores["num_errors"] == 24
        assert scores["num_errors"] == num_bad and np.isfinite(list(scores.values())).all()
    else:
        with pytest.raises(ProbeError, match="images of the images that can be decoded"):
            probe(recipe, show_progress=False)


@pytest.mark.parametrize("num_images", [1, 4, 5])
def test_any_number_of_samples_is_drawn(networks, tmp_path, num_images):
    recipe = recipe_of(*networks.values(), f"output={tmp_path}", "sample.num_steps=2",
                       f"sample.num_images={num_images}", "sample.shard_size=4",
                       "sample.classes=[dog]")  # fmt: skip
    manifest = sample(recipe, show_progress=False)
    assert manifest["stored"] == num_images and manifest["class_names"] == ["cat", "dog"]
    drawn = list(read_samples(str(tmp_path), len(manifest["shards"])))
    assert sum(len(pictures) for pictures, _ in drawn) == num_images
    assert {int(label) for _, labels in drawn for label in labels} == {1}
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == num_images
    recipe.sample.classes = [1]  # the number of the same class: nothing is refused
    assert sample(recipe, show_progress=False) == manifest
