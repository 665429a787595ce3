"""Precompute: on plain functions, then with real Ray processes that are really killed."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.memory import MEBI, Watch
from fae.pipelines.config.recipe import Recipe, RecipeError, load_recipe
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.records import SourceError
from fae.pipelines.data.sources import list_images, plan_images
from fae.pipelines.doctor.memory import PYTHON, precompute_memory, total
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.latents.filling import TooManyErrors
from fae.pipelines.latents.plan import ensure_plan, open_plan
from fae.pipelines.latents.precompute_job import fingerprint_parts, precompute, shard_stages
from fae.pipelines.latents.precompute_text_job import precompute_text
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.shards import read_errors
from fae.pipelines.latents.text_store import TextStore
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.networks.text_encoder import CaptionEncoder
from fae.pipelines.networks.untrained import build_autoencoder
from fae.pipelines.runtime import room
from fae.pipelines.runtime.actor_pool import dataset_of
from fae.pipelines.runtime.room import NoRoom
from fae.pipelines.storage.claims import StoreMismatch
from fae.pipelines.storage.paths import StorageError
from fae_core import checkpoint
from fae_core.backbone import load_backbone
from fae_core.checkpoint import CheckpointError
from fae_core.text import TextSpec
from tests.tiny import ROOT, save_text_encoder

TINY = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "autoencoder.latent_dim=8",
    "autoencoder.encoder.num_heads=3",
    "autoencoder.encoder.head_dim=32",
    "autoencoder.decoder.num_heads=3",
    "autoencoder.decoder.depth=1",
    "precompute.shard_size=8",
    "precompute.batch_size=4",
]


def save_autoencoder(path: Path, seed: int = 0, **fingerprints: str) -> Path:
    recipe = load_recipe("photos-dinov2s", TINY)
    backbone = load_backbone(recipe.backbone.name, recipe.backbone.weights)
    torch.manual_seed(seed)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    theirs = {"backbone": f"{recipe.backbone.name}:{backbone.weights_sha256}", "image_size": "256"}
    checkpoint.save(path, model, {**theirs, **fingerprints})
    return path


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


def overrides(images: Path | str, autoencoder: Path, output: Path | str, *more: str) -> list[str]:
    return [
        *TINY,
        f"data.path={images}",
        f"autoencoder.checkpoint={autoencoder}",
        f"output={output}",
        "precompute.precision=fp32",
        *more,
    ]


def recipe_for(images: Path | str, autoencoder: Path, output: Path | str, *more: str) -> Recipe:
    return load_recipe("photos-dinov2s", overrides(images, autoencoder, output, *more))


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store by its name; the manifest without what tells when it ran, the recipe
    without its paths."""
    files = {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "recipe.yaml"
    }
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"])
        del manifest["run"]
        files["manifest.json"] = json.dumps(manifest).encode()
    return files


# Without Ray


def test_columns_are_the_posterior_of_the_image_and_of_its_mirror_image(autoencoder):
    recipe = recipe_for(
        "x", autoencoder, "y", "precompute.columns=[mean,logvar,mean_flip,logvar_flip]",
        "precompute.precision=fp32",
    )  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3), dtype=np.uint8)
    encoder = LatentEncoder.of(recipe)
    columns = encoder.encode(images, batch_size=2)
    assert {v.shape for v in columns.values()} == {(5, 8, 14, 14)}
    mirrored = encoder.encode(images[:, :, ::-1].copy(), batch_size=5)
    for name in ("mean", "logvar"):
        np.testing.assert_allclose(columns[f"{name}_flip"], mirrored[name], atol=2e-3)
        assert np.abs(columns[name] - mirrored[name]).max() > 0.01
    with torch.no_grad():
        posterior = encoder.autoencoder.encode(encoder.backbone(torch.from_numpy(images)))
    grid = posterior.mean.reshape(5, 14, 14, 8).permute(0, 3, 1, 2).numpy()
    np.testing.assert_allclose(columns["mean"], grid, atol=2e-3)


def test_an_autoencoder_of_another_backbone_or_size_is_refused(tmp_path):
    other = save_autoencoder(tmp_path / "a.safetensors", backbone="dinov2_vitl14:0123")
    with pytest.raises(CheckpointError, match="trained with backbone dinov2_vitl14:0123"):
        LatentEncoder.of(recipe_for("x", other, "y"))
    smaller = save_autoencoder(tmp_path / "b.safetensors", image_size="224")
    with pytest.raises(CheckpointError, match="image_size 224, here it is 256"):
        LatentEncoder.of(recipe_for("x", smaller, "y"))


def test_precompute_says_what_it_needs(photographs, autoencoder, tmp_path):
    with pytest.raises(RecipeError, match=r"data.path=…, autoencoder.checkpoint=… and output=…"):
        precompute(load_recipe("photos-dinov2s"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SourceError, match="no files"):
        precompute(recipe_for(empty, autoencoder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# With Ray


@pytest.fixture(scope="module")
def watched(photographs, autoencoder, tmp_path_factory, ray_session) -> tuple[Path, Watch]:
    """A finished store, and what memory its making took."""
    output = tmp_path_factory.mktemp("uninterrupted") / "store"
    # What earlier tests left in this process is not the job's.
    left = max(0, psutil.Process().memory_full_info().uss - PYTHON) / MEBI
    with Watch() as watch:
        manifest = precompute(recipe_for(photographs, autoencoder, output), show_progress=False)
    watch.peak["all processes"] -= left
    assert (manifest["planned"], manifest["stored"], manifest["errors"]) == (96, 96, 0)
    assert verify_store(str(output)) == []
    return output, watch


@pytest.fixture(scope="module")
def uninterrupted(watched) -> Path:
    return watched[0]


@pytest.mark.integration
def test_a_run_takes_no_more_memory_than_its_dry_run_says(photographs, autoencoder, watched):
    output, watch = watched
    processes = precompute_memory(recipe_for(photographs, autoencoder, output))
    store = total(p for p in processes if p.name == "object store") / MEBI
    rest = total(processes) / MEBI - store
    # Twelve small shards do not need every process that a long run has.
    assert 0.4 * rest < watch.peak["all processes"] < 1.1 * rest
    assert watch.peak["object store"] < 1.1 * store


@pytest.mark.integration
def test_stored_latents_are_what_the_bare_model_gives(photographs, autoencoder, uninterrupted):
    from fae.pipelines.data.crops import decode_records
    from fae.pipelines.data.reading import read_records

    recipe = recipe_for(photographs, autoencoder, uninterrupted)
    records = open_plan(str(uninterrupted)).shard(3)
    images, _, _ = decode_records(records, read_records(records, recipe.data), 256, recipe.data)
    expected = LatentEncoder.of(recipe).encode(images, recipe.precompute.batch_size)["mean"]
    shard = LatentStore.open(str(uninterrupted)).read_shard(3)
    assert shard["key"] == [r.key for r in records]
    # bfloat16 autocast on another number of threads: last bits of a sum may differ.
    np.testing.assert_allclose(shard["mean"], expected, atol=0.02)


@pytest.mark.integration
def test_ray_data_reads_the_store(uninterrupted):
    dataset = LatentStore.open(str(uninterrupted)).to_ray_dataset(columns=["key", "mean"])
    rows = dataset.take_all()
    assert len(rows) == 96
    expected = LatentStore.open(str(uninterrupted)).read_shard(0)
    by_key = {row["key"]: row["mean"] for row in rows}
    for key, latent in zip(expected["key"], expected["mean"], strict=True):
        assert by_key[key].dtype == np.float16 and np.array_equal(by_key[key], latent)


@pytest.mark.integration
def test_captions_become_stored_states_by_ray(write_store, tmp_path, ray_session):
    captions = {row: ("a red cat" if row % 3 else "a small house", None) for row in range(20)}
    latents = write_store(tmp_path / "latents", ("mean",), False, captions)
    values = [f"latents={latents.uri}", f"output={tmp_path / 'states'}", "text.max_length=6"]
    values += [f"text.weights={save_text_encoder(tmp_path / 'encoder')}"]
    values += ["precompute.precision=fp32", "precompute.threads_per_actor=1"]
    manifest = precompute_text(load_recipe("photos-dinov2s", values))
    assert (manifest["stored"], manifest["tokens"]) == (20, 20 * 4)
    text = TextStore.open(str(tmp_path / "states"))
    assert verify_store(text.uri) == []
    batch = next(latents.reader(20, 0, captions=True, text=text))
    found = {caption: states for caption, states in zip(batch.captions, batch.states, strict=True)}
    spec = TextSpec(weights=str(tmp_path / "encoder"), max_length=6)
    expected = CaptionEncoder.load(spec).states_of(list(found), 2)
    assert all(map(np.array_equal, found.values(), expected))


@pytest.mark.integration
def test_decoding_is_not_fused_into_the_actors(
    photographs, autoencoder, tmp_path, ray_session, capsys
):
    recipe = recipe_for(photographs, autoencoder, tmp_path)
    stages = shard_stages(recipe, ensure_plan(str(tmp_path), plan_images(recipe.data), 8, {}))
    dataset = dataset_of([{"shard": 0}, {"shard": 1}], stages, recipe.precompute)
    dataset.explain()
    physical = capsys.readouterr().out.rpartition("Physical Plan (Optimized)")[2]
    operators = [line.strip(" +-|") for line in physical.splitlines() if "Operator[" in line]
    assert operators == [
        "TaskPoolMapOperator[Map(store_shard)]",
        "ActorPoolMapOperator[MapBatches(EncodeShards)]",
        "TaskPoolMapOperator[Map(decode_shard)]",
    ], physical


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["precompute.columns=[mean,logvar]"], "columns: mean there, mean,logvar now"),
        (["precompute.precision=bf16"], "precision: fp32 there, bf16 now"),
        (["data.decoder=fast"], "crop: adm-center-crop-1 there, adm-center-crop-1-fast-1 now"),
        (
            ["data.color_profile=srgb"],
            "crop: .*1 there, adm-center-crop-1, srgb-1 now",
        ),
        (["precompute.shard_size=4"], "shard size: 8 there, 4 now"),
    ],
)
def test_another_recipe_on_the_same_output_is_refused(
    photographs, autoencoder, uninterrupted, change, message
):
    before = content(uninterrupted)
    with pytest.raises(StoreMismatch, match=message):
        precompute(recipe_for(photographs, autoencoder, uninterrupted, *change))
    assert content(uninterrupted) == before


@pytest.mark.integration
def test_another_autoencoder_or_source_on_the_same_output_is_refused(
    photographs, autoencoder, uninterrupted, tmp_path
):
    before = content(uninterrupted)
    other = save_autoencoder(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(StoreMismatch, match="autoencoder weights: [0-9a-f]+ there, [0-9a-f]+ now"):
        precompute(recipe_for(photographs, other, uninterrupted))
    more = tmp_path / "more"
    shutil.copytree(photographs, more)
    with pytest.raises(StoreMismatch, match="96 images with another address"):
        precompute(recipe_for(more, autoencoder, uninterrupted))
    assert content(uninterrupted) == before


@pytest.mark.integration
def test_a_finished_store_is_returned_as_it_is(photographs, autoencoder, uninterrupted):
    before = content(uninterrupted)
    manifest = precompute(recipe_for(photographs, autoencoder, uninterrupted), show_progress=False)
    assert manifest == json.loads((uninterrupted / "manifest.json").read_text())
    assert content(uninterrupted) == before


@pytest.mark.integration
def test_actors_in_several_lanes_write_the_same_bytes(
    photographs, autoencoder, uninterrupted, tmp_path, ray_session, monkeypatch
):
    monkeypatch.setattr("fae.pipelines.runtime.actor_pool.ACTORS_PER_LANE", 1)
    monkeypatch.setattr(
        "fae.pipelines.latents.manifest.SHARDS_AT_ONCE", 4
    )  # so tasks read the footers
    more = ["precompute.num_actors=2", "precompute.cpus_per_actor=0.4"]
    recipe = recipe_for(photographs, autoencoder, tmp_path, *more)
    manifest = precompute(recipe, show_progress=False)
    assert manifest["run"]["shards_encoded"] == 12
    assert content(tmp_path) == content(uninterrupted)


@pytest.mark.integration
def test_a_store_is_resumed_with_the_precision_that_it_began_with(
    photographs, autoencoder, uninterrupted, without_ray, monkeypatch
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    before = content(uninterrupted)
    auto = recipe_for(photographs, autoencoder, uninterrupted, "precompute.precision=auto")
    precompute(auto, show_progress=False)  # of a store in fp32, on a processor that prefers bf16
    assert content(uninterrupted) == before


# Bad images


def bomb_png() -> bytes:
    """A PNG that declares 20000 x 20000 grey pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 20001)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def write_awkward_images(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Fill `folder`; the keys that must be stored, and the others with a word of their error."""
    photo = Image.effect_noise((320, 280), 60).convert("RGB")
    folder.mkdir()
    photo.save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:4000])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"These words are no picture.")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("L").save(folder / "grey.png")
    sixteen = (np.asarray(photo.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    photo.quantize(16).save(folder / "palette.png", transparency=3)
    for kind in ("gif", "webp"):
        photo.save(folder / f"animated.{kind}", save_all=True, append_images=[photo.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    (folder / "bomb.png").write_bytes(bomb_png())
    (folder / "ein Bild – 画像.jpg").write_bytes((folder / "whole.jpg").read_bytes())
    bad = {"truncated.jpg": "truncated", "zero.jpg": "empty file", "text.jpg": "not an image",
           "bomb.png": "data.max_pixels"}  # fmt: skip
    good = {path.name for path in folder.iterdir()} - bad.keys()
    return good, bad


def test_awkward_images_end_the_same_with_either_decoder(tmp_path):
    from fae.pipelines.data.crops import decode_records
    from fae.pipelines.data.reading import read_records

    good, bad = write_awkward_images(tmp_path / "images")
    ends = {}
    for decoder in ("exact", "fast"):
        data = DataSection(path=str(tmp_path / "images"), decoder=decoder)
        records = list_images(data)
        ends[decoder] = decode_records(records, read_records(records, data), 256, data)
    (exact, kept, errors), (fast, fast_kept, fast_errors) = ends["exact"], ends["fast"]
    assert (fast_kept, fast_errors) == (kept, errors)
    assert {records[i].key for i in kept} == good and {e["key"] for e in errors} == bad.keys()
    assert np.abs(fast.astype(int) - exact).max() <= 2


def test_every_awkward_image_ends_in_exactly_one_place(autoencoder, tmp_path, without_ray):
    good, bad = write_awkward_images(tmp_path / "images")
    more = ["precompute.max_error_rate=1", "precompute.shard_size=5"]
    output = tmp_path / "store"
    manifest = precompute(
        recipe_for(tmp_path / "images", autoencoder, output, *more), show_progress=False
    )
    assert (manifest["planned"], manifest["stored"], manifest["errors"]) == (14, 10, 4)
    store = LatentStore.open(str(output))
    stored = [key for i in range(store.num_shards) for key in store.read_shard(i)["key"]]
    assert sorted(stored) == sorted(good)
    errors = {e["key"]: e for e in read_errors(str(output))}
    assert errors.keys() == bad.keys()
    for key, word in bad.items():
        assert word in errors[key]["message"] and errors[key]["stage"] == "decode"
    assert verify_store(str(output)) == []


@pytest.mark.parametrize("num_good", [0, 1])
def test_shards_without_one_good_image_are_stored_with_their_errors(
    autoencoder, tmp_path, without_ray, num_good
):
    images = tmp_path / "images"
    images.mkdir()
    photo = Image.effect_noise((280, 260), 60).convert("RGB")
    for index in range(9):  # broken ones come first, so they fill whole shards
        (images / f"{index:02d}.jpg").write_bytes(b"no image" * (index < 9 - num_good))
        if index >= 9 - num_good:
            photo.save(images / f"{index:02d}.jpg")
    output = tmp_path / "store"
    more = ["precompute.max_error_rate=1", "precompute.shard_size=4"]
    more += ["precompute.columns=[mean,logvar_flip]"]
    manifest = precompute(recipe_for(images, autoencoder, output, *more), show_progress=False)
    counts = (manifest["planned"], manifest["stored"], manifest["errors"])
    assert counts == (9, num_good, 9 - num_good)
    assert manifest["latent_shape"] == [8, 14, 14]
    assert verify_store(str(output)) == []
    store = LatentStore.open(str(output))
    stored = [key for i in range(store.num_shards) for key in store.read_shard(i)["key"]]
    assert stored == [f"{index:02d}.jpg" for index in range(9 - num_good, 9)]


def test_a_repaired_source_is_read_anew_by_the_same_command(autoencoder, tmp_path, without_ray):
    images, output = tmp_path / "images", tmp_path / "store"
    images.mkdir()
    photo = Image.effect_noise((60, 50), 60).convert("RGB")
    for index in range(9):
        photo.save(images / f"{index}.png")
    recipe = recipe_for(images, autoencoder, output, "precompute.shard_size=3")
    ensure_plan(str(output), list_images(recipe.data), 3, fingerprint_parts(recipe))
    (images / "4.png").write_bytes(b"no image")
    (images / "7.png").rename(tmp_path / "7.png")
    with pytest.raises(TooManyErrors, match="run the same command again"):
        precompute(recipe, show_progress=False)
    photo.save(images / "4.png")
    with pytest.raises(TooManyErrors, match=r"7.png \[read\]"):
        precompute(recipe, show_progress=False)
    (tmp_path / "7.png").rename(images / "7.png")
    manifest = precompute(recipe, show_progress=False)
    assert (manifest["stored"], manifest["errors"]) == (9, 0)
    assert manifest["run"]["shards_encoded"] == 1
    assert verify_store(str(output)) == []


@pytest.mark.integration
def test_tasks_read_the_unreadable_images_of_many_shards_again(autoencoder, tmp_path, ray_session):
    images, output = tmp_path / "images", tmp_path / "store"
    images.mkdir()
    photo = Image.effect_noise((60, 50), 60).convert("RGB")
    for index in range(9):
        photo.save(images / f"{index}.png")
    bad = ["1.png", "4.png", "7.png"]  # one of each shard
    for name in bad:
        (images / name).write_bytes(b"no image")
    shards = "precompute.shard_size=3"
    allowed = recipe_for(images, autoencoder, output, shards, "precompute.max_error_rate=1")
    assert precompute(allowed, show_progress=False)["errors"] == 3
    (output / "manifest.json").unlink()  # as if the job had ended before its commit
    for name in bad[:2]:
        photo.save(images / name)
    recipe = recipe_for(images, autoencoder, output, shards, "precompute.max_error_rate=0.2")
    manifest = precompute(recipe, show_progress=False)
    assert (manifest["stored"], manifest["errors"]) == (8, 1)
    assert manifest["run"]["shards_encoded"] == 2
    assert verify_store(str(output)) == []


def test_a_source_that_is_away_ends_the_job_and_no_image(
    autoencoder, tmp_path, without_ray, monkeypatch
):
    images, output = tmp_path / "images", tmp_path / "store"
    images.mkdir()
    for index in range(9):
        Image.new("RGB", (20, 20)).save(images / f"{index}.png")
    more = ["precompute.shard_size=3", "precompute.max_error_rate=1"]
    recipe = recipe_for(images, autoencoder, output, *more)
    sound = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "4.png":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return sound(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(StorageError, match="4.png: Stale file handle"):
        precompute(recipe, show_progress=False)
    assert list(read_errors(str(output))) == []
    monkeypatch.setattr(Path, "read_bytes", sound)
    manifest = precompute(recipe, show_progress=False)
    assert (manifest["stored"], manifest["errors"]) == (9, 0)


@pytest.mark.integration
def test_one_row_group_for_all_images_gives_the_latents_of_small_groups(
    autoencoder, tmp_path, ray_session
):
    random = np.random.default_rng(0)
    blobs = []
    for _ in range(24):  # 3 MB each, so that the group is a large one
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (1000, 1000, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "BMP")
        blobs.append(buffer.getvalue())
    blobs[5] = b"no image"
    latents = {}
    for name, size in (("one", len(blobs)), ("small", 4)):
        source = tmp_path / name
        source.mkdir()
        pq.write_table(pa.table({"image": blobs}), source / "a.parquet", row_group_size=size)
        more = ["precompute.max_error_rate=1", "precompute.shard_size=5"]
        output = tmp_path / f"{name} store"
        manifest = precompute(recipe_for(source, autoencoder, output, *more), show_progress=False)
        assert (manifest["planned"], manifest["stored"]) == (24, 23)
        store = LatentStore.open(str(output))
        shards = [store.read_shard(index) for index in range(store.num_shards)]
        latents[name] = [(shard["key"], shard["mean"].tobytes()) for shard in shards]
        assert verify_store(str(output)) == []
    assert latents["one"] == latents["small"]


@pytest.mark.integration
def test_a_file_that_vanishes_after_planning_is_an_error_of_that_image(
    photographs, autoencoder, tmp_path, without_ray
):
    images, output = tmp_path / "images", tmp_path / "store"
    shutil.copytree(photographs, images)
    recipe = recipe_for(images, autoencoder, output, "precompute.max_error_rate=0.02")
    ensure_plan(str(output), list_images(recipe.data), 8, fingerprint_parts(recipe))
    (images / "coffee 03.jpg").unlink()
    manifest = precompute(recipe, show_progress=False)
    assert (manifest["stored"], manifest["errors"]) == (95, 1)
    (error,) = read_errors(str(output))
    assert (error["key"], error["stage"]) == ("coffee 03.jpg", "read")


def test_a_damaged_file_of_many_images_counts_by_its_share_of_the_files(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(20):
        table = pa.table({"image": [b"x"] * 50})
        pq.write_table(table, tmp_path / "images" / f"{index:02d}.parquet")
    (tmp_path / "images" / "07.parquet").write_bytes(b"damaged")
    checkpoint_ = tmp_path / "autoencoder.safetensors"
    checkpoint_.touch()
    output = tmp_path / "store"
    with pytest.raises(TooManyErrors, match=r"\(5.0% of the files\)(.|\n)*07.parquet \[plan\]"):
        precompute(recipe_for(tmp_path / "images", checkpoint_, output), show_progress=False)
    assert not output.exists()


def test_a_store_that_is_begun_goes_on_where_its_source_lost_more_than_a_new_one_may(
    autoencoder, tmp_path, without_ray
):
    source, output = tmp_path / "images", tmp_path / "store"
    source.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    for name in "ab":
        pq.write_table(pa.table({"image": [buffer.getvalue()]}), source / f"{name}.parquet")
    recipe = recipe_for(source, autoencoder, output, "precompute.max_error_rate=0.5")
    ensure_plan(str(output), list_images(recipe.data), 8, fingerprint_parts(recipe))
    (source / "b.parquet").write_bytes(b"damaged")
    recipe.precompute.max_error_rate = 0.4
    with pytest.raises(TooManyErrors, match=r"(?s)b.parquet#00000000 \[read\]"):
        precompute(recipe, show_progress=False)
    recipe.precompute.max_error_rate = 0.5
    manifest = precompute(recipe, show_progress=False)
    assert (manifest["stored"], manifest["errors"]) == (1, 1)


@pytest.mark.integration
def test_too_many_errors_commit_nothing_and_lose_nothing(
    photographs, autoencoder, tmp_path, without_ray
):
    images, output = tmp_path / "images", tmp_path / "store"
    shutil.copytree(photographs, images)
    for index in range(4):
        (images / f"rocket {index:02d}.jpg").write_bytes(b"no picture")
    with pytest.raises(
        TooManyErrors, match=r"max_error_rate=0.01(.|\n)*rocket 0\d.jpg \[decode\] not an image"
    ):
        precompute(recipe_for(images, autoencoder, output), show_progress=False)
    assert not (output / "manifest.json").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (output / "shards").iterdir()}
    allowed = recipe_for(images, autoencoder, output, "precompute.max_error_rate=0.05")
    manifest = precompute(allowed, show_progress=False)
    assert (manifest["stored"], manifest["errors"]) == (92, 4)
    again = {p.name: p.stat().st_mtime_ns for p in (output / "shards").iterdir()}
    assert finished and finished.items() <= again.items()


# Killing


def actor_pids() -> list[int]:
    """Processes that encode, of this test's own Ray, which is a child of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker(MapBatches(EncodeShards))" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.integration
def test_an_actor_killed_in_the_middle_of_a_shard_costs_nothing(
    photographs, autoencoder, uninterrupted, tmp_path, ray_session
):
    from threading import Thread

    output = tmp_path / "store"
    results: list[dict] = []
    recipe = recipe_for(photographs, autoencoder, output)
    job = Thread(target=lambda: results.append(precompute(recipe, show_progress=False)))
    before = set(actor_pids())
    job.start()
    wait_for(lambda: len(list(output.glob("shards/*.parquet"))) >= 2)
    victims = set(actor_pids()) - before
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    job.join(timeout=180)
    assert not job.is_alive() and results
    assert content(output) == content(uninterrupted)


@pytest.mark.integration
def test_actors_that_leave_no_cpu_for_decoding_are_refused_and_a_job_that_waits_says_so(
    ray_session, photographs, autoencoder, tmp_path, monkeypatch, capsys
):
    two = ["precompute.num_actors=2", "precompute.cpus_per_actor=1"]
    with pytest.raises(NoRoom, match="leave no 0.5 of the 2 CPUs for a task that decodes"):
        precompute(recipe_for(photographs, autoencoder, tmp_path / "store", *two))
    monkeypatch.setattr(room, "SILENT_SECONDS", 0.05)
    with room.Waiting():
        time.sleep(0.5)
    said = capsys.readouterr().err
    assert "fae: nothing was finished in the last 0 minutes; 1 node is up, " in said


@pytest.mark.integration
def test_a_killed_driver_resumes_with_missing_shards_only_and_the_same_bytes(
    photographs, autoencoder, uninterrupted, tmp_path
):
    output = tmp_path / "store"
    command = [
        sys.executable, "-m", "fae", "precompute", "photos-dinov2s",
        *overrides(photographs, autoencoder, output),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(output.glob("shards/*.parquet"))) >= 3 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in output.glob("shards/*.parquet")}
    assert 3 <= len(finished) < 12
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["run"]["shards_encoded"] <= 12 - len(finished)
    kept = {p.name: p.stat().st_mtime_ns for p in output.glob("shards/*.parquet")}
    assert finished.items() <= kept.items()
    assert content(output) == content(uninterrupted)


# S3


@pytest.mark.integration
def test_from_s3_to_s3_gives_the_local_latents(
    photographs, autoencoder, uninterrupted, s3_server, tmp_path
):
    secret = "not-for-any-log"
    environment = {
        **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=s3_server, region_name="us-east-1",
        aws_access_key_id="testing", aws_secret_access_key=secret,
    )  # fmt: skip
    client.create_bucket(Bucket="pipeline")
    for path in photographs.iterdir():
        client.upload_file(str(path), "pipeline", f"images/{path.name}")
    client.upload_file(str(autoencoder), "pipeline", "autoencoder.safetensors")
    uri = "s3://pipeline"
    arguments = overrides(f"{uri}/images", f"{uri}/autoencoder.safetensors", f"{uri}/store")
    done = subprocess.run(
        [sys.executable, "-m", "fae", "precompute", "photos-dinov2s", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    local = LatentStore.open(str(uninterrupted))
    for index in range(local.num_shards):
        name = f"shards/{index:08d}.parquet"
        body = client.get_object(Bucket="pipeline", Key=f"store/{name}")["Body"].read()
        assert body == (uninterrupted / name).read_bytes()
    manifest = json.loads(
        client.get_object(Bucket="pipeline", Key="store/manifest.json")["Body"].read()
    )
    assert [e["etag"] for e in manifest["shards"]] == [e["etag"] for e in local.manifest["shards"]]
