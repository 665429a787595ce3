"""Data sets of the Hugging Face Hub as sources: planned and read in ranges, without a network.

The Hub is a server on loopback; the Parquet files are those that `datasets` writes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config import load_recipe
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.reading import load_crops, read_records
from fae.pipelines.data.records import ImageRecord, SourceError, records_of
from fae.pipelines.data.sources import plan_source
from fae.pipelines.latents import LatentStore, precompute
from fae.pipelines.storage import paths
from fae.pipelines.storage.paths import StorageError
from tests.hub_server import TOKEN, HubServer
from tests.tiny import TINY, save_autoencoder

NAME = "somebody/pets"
SOURCE = f"hf://datasets/{NAME}"
CLASSES = ["cat", "dog", "eel"]
NUM_IMAGES, GROUP = 24, 8


def noisy_jpeg(seed: int) -> bytes:
    """About 30 KB, so that a file is larger than the end of it that Arrow reads at once."""
    pixels = np.random.default_rng(seed).integers(0, 256, (160, 160, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


IMAGES = [noisy_jpeg(seed) for seed in range(NUM_IMAGES)]


def parquet_file(path: Path, classes: list[str] = CLASSES) -> bytes:
    """A file with image structs and a ClassLabel, in row groups of GROUP rows."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    rows = {
        "image": [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(IMAGES)],
        "label": [i % 3 for i in range(NUM_IMAGES)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=GROUP)
    return path.read_bytes()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> bytes:
    return parquet_file(tmp_path_factory.mktemp("parquet") / "pets.parquet")


@pytest.fixture
def pets(hub: HubServer, parquet: bytes) -> HubServer:
    """A repository as `push_to_hub` leaves it."""
    files = {f"data/{split}-00000-of-00001.parquet": parquet for split in ("train", "test")}
    hub.add(f"datasets/{NAME}", {"README.md": b"# Pets", ".gitattributes": b"", **files})
    hub.add(f"datasets/{NAME}@refs/convert/parquet", {"default/train/0000.parquet": parquet})
    return hub


def test_a_data_set_is_planned_with_its_classes(pets):
    source = plan_source(DataSection(path=SOURCE))
    account = source.account
    assert account.class_names == CLASSES and account.labels_from == "column label (ClassLabel)"
    assert (account.num_files, account.num_images, account.num_labels) == (4, 48, 48)
    assert {skip.example for skip in account.skipped.values()} == {
        f"{SOURCE}/README.md",
        f"{SOURCE}/.gitattributes",
    }
    first = records_of(source.table)[0]
    assert first.key == "data/test-00000-of-00001.parquet#00000000" and first.label == 0
    printed = CliRunner().invoke(app, ["plan", "photos-dinov2s", f"data.path={SOURCE}", "--json"])
    assert json.loads(printed.output)["class_names"] == CLASSES


@pytest.mark.parametrize(
    ("address", "key"),
    [
        (f"{SOURCE}/data/train-*.parquet", "train-00000-of-00001.parquet#00000000"),
        (f"{SOURCE}@main/data/train-*", "train-00000-of-00001.parquet#00000000"),
        (f"{SOURCE}@refs/convert/parquet/default/", "train/0000.parquet#00000000"),
        (f"{SOURCE}/data/train-00000-of-00001.parquet", "train-00000-of-00001.parquet#00000000"),
    ],
)
def test_a_part_of_a_data_set_is_named_by_revision_path_and_pattern(pets, address, key):
    data = DataSection(path=address)
    source = plan_source(data)
    assert len(source.table) == NUM_IMAGES
    records = records_of(source.table)
    assert records[0].key == key
    assert read_records(records, data) == IMAGES


def test_only_footers_labels_and_the_wanted_row_group_are_read(pets, parquet):
    data = DataSection(path=f"{SOURCE}/data/train-*")
    name = "train-00000-of-00001.parquet"

    def bytes_read() -> int:
        ends = [r.removeprefix("bytes=").split("-") for r in pets.ranges(name)]
        pets.requests.clear()
        return sum(int(stop) - int(start) + 1 for start, stop in ends)

    records = records_of(plan_source(data).table)
    footer = 1 << 16
    assert len(parquet) > 8 * footer
    assert 0 < bytes_read() <= 3 * footer + 3 * 200
    images, kept, errors = load_crops(records[GROUP : GROUP + 2], 32, data)
    assert images.shape == (2, 32, 32, 3) and kept == [0, 1] and not errors
    assert bytes_read() <= footer + len(parquet) / 3


def test_precompute_reads_the_hub(pets, tmp_path, without_ray):
    autoencoder = save_autoencoder(tmp_path / "autoencoder.safetensors")
    stores = []
    (tmp_path / "local").mkdir()
    (tmp_path / "local/train-00000-of-00001.parquet").write_bytes(
        paths.read_bytes(f"{SOURCE}/data/train-00000-of-00001.parquet")
    )
    for source in (f"{SOURCE}/data/train-*", str(tmp_path / "local")):
        output = str(tmp_path / f"store{len(stores)}")
        recipe = load_recipe(
            "photos-dinov2s",
            [*TINY, f"data.path={source}", f"autoencoder.checkpoint={autoencoder}",
             f"output={output}"],
        )  # fmt: skip
        precompute(recipe, show_progress=False)
        stores.append(LatentStore.open(output))
    assert stores[0].class_names == CLASSES and len(stores[0]) == NUM_IMAGES
    for index in range(3):
        hub_shard, local_shard = (store.read_shard(index) for store in stores)
        assert [hub_shard[c] for c in ("key", "label")] == [
            local_shard[c] for c in ("key", "label")
        ]
        assert np.array_equal(hub_shard["mean"], local_shard["mean"])


def test_a_private_data_set_needs_the_token_and_no_error_shows_it(pets, monkeypatch):
    pets.private.add(f"datasets/{NAME}")
    assert len(plan_source(DataSection(path=SOURCE)).table) == 2 * NUM_IMAGES
    secret = "hf_of_somebody_else_987654321"
    monkeypatch.setenv("HF_TOKEN", secret)
    data = DataSection(path=SOURCE)
    with pytest.raises((SourceError, StorageError)) as raised:
        plan_source(data)
    shown = str(raised.value) + repr(raised.value.__cause__)
    record = ImageRecord("key", f"{SOURCE}/data/train-00000-of-00001.parquet#row=0")
    with pytest.raises(StorageError, match="HF_TOKEN") as error:
        read_records([record], data)
    printed = CliRunner().invoke(app, ["plan", "photos-dinov2s", f"data.path={SOURCE}"]).output
    for text in (shown, str(error.value), printed):
        assert secret not in text and TOKEN not in text


def test_what_is_not_on_the_hub_is_said(pets, tmp_path):
    for address in (f"{SOURCE}/data/validation-*", "hf://datasets/nobody/nothing"):
        with pytest.raises(SourceError, match="does not exist"):
            plan_source(DataSection(path=address))
    outside = ImageRecord("key", "hf://datasets/nobody/nothing/a.jpg")
    (error,) = read_records([outside], DataSection(path=f"{SOURCE}/data/train-*"))
    assert "outside data.path" in str(error)


def test_files_whose_classes_differ_are_refused(pets, tmp_path):
    other = parquet_file(tmp_path / "other.parquet", ["cat", "eel", "dog"])
    pets.add("datasets/somebody/mixed", {"a.parquet": other, "b.parquet": other})
    mixed = DataSection(path="hf://datasets/somebody/mixed")
    assert plan_source(mixed).account.class_names == ["cat", "eel", "dog"]
    pets.repositories["datasets/somebody/mixed"]["b.parquet"] = parquet_file(tmp_path / "b.parquet")
    with pytest.raises(SourceError, match="b.parquet.*1 was 'eel' and is 'dog'"):
        plan_source(mixed)
