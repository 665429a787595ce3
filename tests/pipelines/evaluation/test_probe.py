"""The probe: its split and its scores on plain values, then whole, with real Ray processes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.data.sources import list_images
from fae.pipelines.evaluation.errors import ProbeError
from fae.pipelines.evaluation.probe_features import (
    KINDS,
    Probed,
    ProbeImages,
    batches_of,
)
from fae.pipelines.evaluation.probe_job import (
    Split,
    image_pairs,
    probe,
    score,
    split_images,
    summary,
)
from fae.pipelines.evaluation.tasks import decode_batch
from fae.pipelines.storage.claims import StoreMismatch
from fae_core import checkpoint
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.backbone import load_backbone

TINY = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "backbone.image_size=96",
    "image_size=96",
    "probe.num_neighbors=5",
    "probe.test_fraction=0.4",
    "probe.batch_size=6",
    "probe.figure_rows=2",
]
GRID = (6, 6)


def recipe_for(images: Path | str, autoencoder: Path | str = "x", *more: str) -> Recipe:
    places = [f"data.path={images}", f"autoencoder.checkpoint={autoencoder}"]
    return load_recipe("photos-dinov2s", [*TINY, *places, *more])


def save_autoencoder(path: Path, latent_dim: int, identity: bool) -> Path:
    """A linear encoder whose decoder has no blocks.

    With `identity` the latents are the features, else random mixtures of them.
    """
    backbone = load_backbone("vit_tiny_patch16_224", "random", 96)
    config = AutoencoderConfig(
        backbone.dim, latent_dim, GRID, "linear", decoder_depth=0, decoder_num_heads=3
    )
    torch.manual_seed(0)
    model = FeatureAutoencoder(config)
    with torch.no_grad():
        model.decoder.position.zero_()
        if identity:
            model.encoder.projection.weight.copy_(torch.eye(2 * latent_dim, backbone.dim))
            nn.init.eye_(model.decoder.input.weight)
    fingerprints = {
        "backbone": f"vit_tiny_patch16_224@96:{backbone.weights_sha256}",
        "image_size": "96",
    }
    checkpoint.save(path, model, fingerprints)
    return path


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """48 of the photographs, in a folder for each of the four pictures they are cut from."""
    folder = tmp_path_factory.mktemp("classes")
    for path in sorted(photographs.iterdir())[::2]:
        name, _, number = path.name.partition(" ")
        (folder / name).mkdir(exist_ok=True)
        (folder / name / number).write_bytes(path.read_bytes())
    return folder


# Without Ray --------------------------------------------------------------------------------------


def test_an_images_side_depends_on_its_own_key_alone(class_folders):
    records = list_images(recipe_for(class_folders).data)
    options = recipe_for(class_folders).probe
    split = split_images(options, records, "photos")
    assert len(split.train) + len(split.test) == 48 and len(split.test) > 10
    few = options.model_copy(update={"num_neighbors": 2})
    fewer = split_images(few, records[:30], "photos")
    assert set(fewer.test) == set(split.test) & set(records[:30])
    limits = options.model_copy(update={"train_limit": 7, "test_limit": 3})
    limited = split_images(limits, records, "photos")
    assert (limited.train, limited.test) == (split.train[:7], split.test[:3])


def test_pairs_are_of_one_class_of_every_class_and_no_image_is_in_two():
    test = [ImageRecord(f"{i:02d}", "", label=[0, 1, 1, 2][i % 4]) for i in range(20)]
    pairs = image_pairs(test, 99)
    assert all(a.label == b.label for a, b in pairs)
    assert len({r.key for pair in pairs for r in pair}) == 2 * len(pairs) == 2 * (2 + 5 + 2)
    assert [a.label for a, _ in image_pairs(test, 4)] == [0, 1, 2, 0]


@pytest.mark.parametrize("size", [2, 5, 8])
def test_no_pair_is_cut_and_every_image_is_there_once(size):
    images = [ImageRecord(f"{i:02d}", "", label=i % 3) for i in range(23)]
    pairs = image_pairs(images, 5)
    rows = batches_of(images, pairs, size)
    keys = [[record[0] for record in json.loads(row["records"])] for row in rows]
    assert sorted(key for batch in keys for key in batch) == [image.key for image in images]
    assert max(map(len, keys)) <= size
    paired = [k for k, row in zip(keys, rows, strict=True) if row["paired"]]
    together = [tuple(k[i : i + 2]) for k in paired for i in range(0, len(k), 2)]
    assert together == [(a.key, b.key) for a, b in pairs]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [ImageRecord("a", "", 1), ImageRecord("b", "")],
            "1 of 2 images of photos have no label, the first is 'b'",
        ),
        ([ImageRecord(f"{i}", "", i % 2) for i in range(6)], "lower probe.num_neighbors"),
        ([ImageRecord(f"{i}", "", 5) for i in range(60)], "of one class"),
    ],
)
def test_images_that_cannot_be_probed_are_refused(records, message):
    with pytest.raises(ProbeError, match=message):
        split_images(recipe_for("photos").probe, records, "photos")


def test_scores_of_a_reconstruction_that_forgets_one_class_of_four():
    random = np.random.default_rng(0)
    centres = 4 * np.eye(4, 6)
    images = [ImageRecord(f"{i:03d}", "", label=i % 4) for i in range(200)]
    split = Split(images[:120], images[120:], [])

    def tokens(label: int) -> np.ndarray:
        return centres[label] + 0.1 * random.normal(size=6)

    found = {}
    for image in images:
        assert image.label is not None
        # The reconstruction makes class 3 look like class 2; the latent keeps everything.
        pooled = (tokens(image.label), tokens(min(image.label, 2)), tokens(image.label)[::-1])
        vectors = dict(zip(KINDS, pooled, strict=True))
        found[image.key] = Probed(vectors, 0.5, (3, 4) if image.key > "150" else (0, 0))
    del found["199"], found["000"]  # as if not decoded
    scores = score(recipe_for("x").probe, split, found)
    perfect = [f"{probe}_{kind}" for probe in ("knn", "linear") for kind in ("true", "latent")]
    assert [scores[name] for name in perfect] == [1] * 4
    # 60 of 79 are of a class that is kept; of the two that look alike a probe gets about half.
    for name in ("knn_reconstructed", "linear_reconstructed"):
        assert 0.6 < scores[name] < 0.9
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]
    # The unmodified head calls each of class 3 a 2.
    assert scores["linear_transfer"] == scores["retention_transfer"] == 60 / 79
    assert scores["retention_knn"] == scores["knn_reconstructed"]
    assert (scores["similarity"], scores["matching"]) == (0.5, 0.75)
    counts = {"num_train": 119, "num_test": 79, "num_classes": 4, "num_errors": 2}
    assert {name: scores[name] for name in counts} == counts
    assert "119 train, 79 test, 4 classes, 2 errors" in summary(scores)


def test_a_batch_gives_pooled_vectors_of_its_sound_images_and_matches_of_whole_pairs(tmp_path):
    random = np.random.default_rng(0)
    for name in "abcd":
        pixels = random.integers(0, 256, (100, 110, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    autoencoder = save_autoencoder(tmp_path / "mixture.safetensors", 4, identity=False)
    recipe = recipe_for(tmp_path, autoencoder)
    records = [ImageRecord(f"{name}.png", str(tmp_path / f"{name}.png"), 0) for name in "abcd"]
    pairs = [(records[0], records[1]), (records[2], records[3])]
    (paired,) = batches_of(records, pairs, 4)
    (broken,) = batches_of(records[1:2], [], 4)
    metadata = checkpoint.read_metadata(autoencoder)
    weights = {
        "backbone weights": json.loads(metadata["fingerprints"])["backbone"].partition(":")[2],
        "autoencoder weights": metadata["weights_sha256"],
    }
    actor = ProbeImages(recipe, weights)
    networks = actor.networks

    def run(row):
        decoded = decode_batch(row, recipe.data, recipe.image_size)
        return decoded["images"], actor({name: [value] for name, value in decoded.items()})

    images, found = run(paired)
    assert json.loads(found["keys"][0]) == ["a.png", "c.png", "d.png"]
    (error,) = json.loads(found["errors"][0])
    assert (error["key"], error["stage"]) == ("b.png", "decode")
    features = networks.encoder.backbone(torch.from_numpy(images))
    np.testing.assert_allclose(found["true"][0], features.mean(1).numpy(), atol=1e-5)
    with torch.no_grad():
        latents = networks.encoder.autoencoder.encode(features).mean
    np.testing.assert_allclose(found["latent"][0], latents.mean(1).numpy(), atol=1e-5)
    assert (
        found["matches"][0][[0, 2]].tolist() == [[0, 0], [0, 0]] and found["matches"][0][1, 1] > 1
    )
    _, nothing = run(broken)
    assert [nothing[kind][0].shape for kind in KINDS] == [(0, 192), (0, 192), (0, 4)]
    with pytest.raises(checkpoint.CheckpointError, match="not those that the job was planned with"):
        ProbeImages(recipe, {**weights, "autoencoder weights": "another"})


# With Ray -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.mark.integration
def test_an_identity_retains_everything_and_a_finished_probe_is_not_repeated(
    without_ray, class_folders, tmp_path
):
    autoencoder = save_autoencoder(tmp_path / "identity.safetensors", 192, identity=True)
    output = tmp_path / "probe"
    recipe = recipe_for(class_folders, autoencoder, f"probe.output={output}")
    scores = probe(recipe)
    retained = [f"retention_{probe}" for probe in ("knn", "linear", "transfer")]
    for name in ("similarity", "matching", *retained):
        assert scores[name] == pytest.approx(1.0, abs=1e-6), name
    assert scores["knn_true"] == scores["knn_latent"] > 0.5
    assert scores["linear_true"] == scores["linear_latent"] > 0.5
    for figure in ("matching.png", "similarity.png"):
        assert min(Image.open(io.BytesIO((output / figure).read_bytes())).size) > 300
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    recipe.probe.num_actors = 3  # how it is computed is not what is computed
    assert probe(recipe) == scores
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    recipe.probe.num_neighbors = 6
    with pytest.raises(StoreMismatch, match=r"probe\.num_neighbors: '5' there, '6' now"):
        probe(recipe)


@pytest.mark.integration
def test_two_actors_give_the_scores_of_one_and_damaged_images_are_counted_or_refused(
    ray_session, class_folders, tmp_path
):
    autoencoder = save_autoencoder(tmp_path / "mixture.safetensors", 4, identity=False)
    (class_folders / "rocket" / "damaged.jpg").write_bytes(b"no image")
    recipe = recipe_for(class_folders, autoencoder, "probe.max_error_rate=0.05")
    one = probe(recipe)
    recipe.probe.num_actors = 2
    assert probe(recipe) == one
    assert one["num_errors"] == 1 and one["num_train"] + one["num_test"] == 48
    assert 0.0 < one["similarity"] < 0.999 and one["matching"] < 1.0
    recipe.probe.max_error_rate = 0.01
    with pytest.raises(ProbeError, match=r"1 of 49 images could not be decoded(.|\n)*damaged\.jpg"):
        probe(recipe)
