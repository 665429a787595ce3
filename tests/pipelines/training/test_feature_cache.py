"""data.feature_cache: a training reads from it what it would have computed, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.sources import list_images
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.training import feature_cache
from fae.pipelines.training.batches import images_and_features
from fae.pipelines.training.feature_cache import (
    cache_folder,
    cached_feed,
    computed_features,
    open_cache,
    write_cache,
)
from fae.pipelines.training.image_feed import image_feed
from fae.pipelines.training.job import TrainingError
from tests.tiny import SMALLEST_BACKBONE, TINY

pytestmark = pytest.mark.usefixtures("without_ray")
CPU = torch.device("cpu")
PRECISION = "autoencoder.training.precision=fp32"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Nineteen pictures of noise, one of them damaged, and a cache of files of four pictures."""
    monkeypatch.setattr(feature_cache, "PART_IMAGES", 4)
    monkeypatch.setattr(feature_cache, "HELD_OUT_BATCH", 2)
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for index in range(19):
        picture = Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8))
        picture.save(tmp_path / f"images/{index:02d}.png")
    (tmp_path / "images/05.png").write_bytes(b"no image")
    places = [f"data.path={tmp_path}/images", f"data.feature_cache={tmp_path}/cache"]
    steps = ["autoencoder.training.batch_size=8", "autoencoder.training.steps=6"]
    return load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE, PRECISION, *places, *steps])


@pytest.mark.parametrize("flip", [True, False])
def test_cached_batches_are_those_that_the_images_give(recipe: Recipe, flip: bool) -> None:
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    training, size = recipe.autoencoder.training, recipe.image_size
    folder = cache_folder(recipe, records, backbone, "fp32", flip)
    write_cache(folder, recipe, records, backbone, "fp32", flip)
    cache = open_cache(folder, len(records))
    cached = cached_feed(cache, records, 3, training, flip)(0, 1, 2, CPU)
    plain = image_feed(records, recipe.data, size, 3, training)(0, 1, 2, CPU)
    num_errors = 0
    for a, b in zip(cached, plain, strict=True):
        assert (a.step, a.samples, a.keys, a.weight) == (b.step, b.samples, b.keys, b.weight)
        assert a.errors == b.errors
        images, features = images_and_features(3, a, flip, backbone)
        wanted_images, wanted = images_and_features(3, b, flip, backbone)
        assert torch.equal(images, wanted_images)
        # Not to the bit: a matrix product may round differently in batches of another size.
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
        num_errors += len(a.errors)
    assert num_errors >= 1
    first = np.concatenate(list(cache.features(10)))
    computed = computed_features(records[:10], recipe.data, size, backbone, "fp32")
    np.testing.assert_allclose(first, np.concatenate(list(computed)), rtol=1e-4, atol=1e-5)
    assert len(first) == 9


def test_a_resumed_training_reads_the_rest_of_the_same_batches(recipe: Recipe) -> None:
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    folder = cache_folder(recipe, records, backbone, "fp32", True)
    write_cache(folder, recipe, records, backbone, "fp32", True)
    cache = open_cache(folder, len(records))
    feed = cached_feed(cache, records, 0, recipe.autoencoder.training, True)
    whole, rest = list(feed(0, 0, 1, CPU)), list(feed(4, 0, 1, CPU))
    assert len(whole) == 6
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a["features"], b["features"]) and a.keys == b.keys


def test_what_was_computed_before_an_interruption_is_kept(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    folder = cache_folder(recipe, records, backbone, "fp32", False)
    computed: list[int] = []
    features_of = feature_cache.features_of

    def counted(network, images, precision):  # type: ignore[no-untyped-def]
        if len(computed) == 5:  # of ten batches
            raise KeyboardInterrupt
        computed.append(len(images))
        return features_of(network, images, precision)

    monkeypatch.setattr(feature_cache, "features_of", counted)
    with pytest.raises(KeyboardInterrupt):
        write_cache(folder, recipe, records, backbone, "fp32", False)
    files = {file.name: file.read_bytes() for file in folder.glob("part_*")}
    assert len(files) == 2
    with pytest.raises(TrainingError, match=r"damaged.*manifest\.json"):
        open_cache(folder, len(records))
    computed[:] = [0] * 6
    write_cache(folder, recipe, records, backbone, "fp32", False)
    assert sum(computed) == 19 - 8
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    write_cache(folder, recipe, records, backbone, "fp32", False)
    assert sum(computed) == 19 - 8
    assert list(open_cache(folder, len(records)).errors) == [5]


def test_a_changed_byte_is_found(recipe: Recipe) -> None:
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    folder = cache_folder(recipe, records, backbone, "fp32", False)
    write_cache(folder, recipe, records, backbone, "fp32", False)
    part = folder / "part_00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-7] ^= 1
    part.write_bytes(content)
    with pytest.raises(TrainingError, match=r"part_00001.* has changed.*Delete that folder"):
        open_cache(folder, len(records))


def test_other_features_have_another_folder(recipe: Recipe) -> None:
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    folders = {
        cache_folder(recipe, records, backbone, "fp32", False),
        cache_folder(recipe, records, backbone, "fp32", True),
        cache_folder(recipe, records, backbone, "bf16", False),
        cache_folder(recipe, records[1:], backbone, "fp32", False),
    }
    backbone.weights_sha256 = "another"
    folders.add(cache_folder(recipe, records, backbone, "fp32", False))
    recipe.data.decoder = "fast"
    folders.add(cache_folder(recipe, records, backbone, "fp32", False))
    assert len(folders) == 6


def test_a_large_set_and_a_bucket_are_refused(recipe: Recipe) -> None:
    backbone, records = backbone_of(recipe), list_images(recipe.data)
    recipe.data.feature_cache_gib = 1e-5
    with pytest.raises(TrainingError, match=r"feature_cache would hold .* for 19 images"):
        cache_folder(recipe, records, backbone, "fp32", False)
    recipe.data.feature_cache = "s3://bucket/cache"
    with pytest.raises(TrainingError, match="give a local folder"):
        cache_folder(recipe, records, backbone, "fp32", False)
