"""Exports, read back as their users' loaders read them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from glob import glob
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from fae.pipelines.data.account import Account
from fae.pipelines.latents.export_layouts import ExportError, export
from fae.pipelines.latents.manifest import encode_manifest

ROOT = Path(__file__).parents[3]
NUM_ROWS, SHAPE = 20, (2, 3, 3)


@pytest.fixture(scope="module")
def store(write_store, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


def rows_of(store, column):
    return np.concatenate([store.read_shard(i)[column] for i in range(store.num_shards)])


def test_lightningdit_files_hold_what_its_data_set_slices(store, tmp_path):
    written = export(store.uri, "lightningdit", str(tmp_path / "out"))
    assert written == {"rows": NUM_ROWS, "files": 2}
    files = sorted(glob(str(tmp_path / "out" / "*.safetensors")))
    found = {"latents": [], "latents_flip": [], "labels": []}
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            num = file.get_slice("labels").get_shape()[0]
            for name, values in found.items():
                values += [file.get_slice(name)[i : i + 1] for i in range(num)]
    latents = torch.cat(found["latents"])
    assert latents.dtype == torch.float32 and latents.shape == (NUM_ROWS, *SHAPE)
    assert np.array_equal(latents.numpy(), rows_of(store, "mean").astype(np.float32))
    assert np.array_equal(torch.cat(found["latents_flip"]).numpy(), rows_of(store, "mean_flip"))
    assert torch.cat(found["labels"]).tolist() == [i % 5 for i in range(NUM_ROWS)]
    stats = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    normalized = (latents - stats["mean"]) / stats["std"]
    assert stats["mean"].shape == (1, SHAPE[0], 1, 1)
    assert torch.allclose(normalized.mean((0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(normalized.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-3)


def test_webdataset_shards_hold_every_row_with_its_class(store, tmp_path):
    assert export(store.uri, "webdataset", str(tmp_path / "out"))["rows"] == NUM_ROWS
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(glob(str(tmp_path / "out" / "*.tar"))):
        with tarfile.open(path) as archive:
            for member in archive:
                name, _, suffix = member.name.partition(".")
                samples.setdefault(name, {})[suffix] = archive.extractfile(member).read()
    means = rows_of(store, "mean")
    assert len(samples) == NUM_ROWS
    for sample in samples.values():
        row = int(json.loads(sample["json"])["key"])
        assert int(sample["cls"]) == row % 5
        assert np.array_equal(np.load(io.BytesIO(sample["mean.npy"])), means[row])


def test_npy_files_are_listed_with_their_labels(store, tmp_path):
    export(store.uri, "npy", str(tmp_path / "out"), "float16")
    listed = json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]
    means = rows_of(store, "mean")
    assert [label for _, label in listed] == [i % 5 for i in range(NUM_ROWS)]
    for row, (name, _) in enumerate(listed):
        array = np.load(tmp_path / "out" / name)
        assert array.dtype == np.float16 and np.array_equal(array, means[row])


def test_what_a_layout_cannot_hold_is_refused(write_store, store, tmp_path):
    plain = write_store(tmp_path / "plain", ("mean",), labels=False)
    with pytest.raises(ExportError, match=r"columns=\[mean,mean_flip\]"):
        export(plain.uri, "lightningdit", str(tmp_path / "a"))
    with pytest.raises(ExportError, match="has no label"):
        export(plain.uri, "npy", str(tmp_path / "b"))
    with pytest.raises(ExportError, match="there are lightningdit"):
        export(store.uri, "hdf5", str(tmp_path / "c"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export(store.uri, "npy", str(tmp_path / "full"))


@pytest.fixture(scope="module")
def named_store(write_store, tmp_path_factory):
    """A store whose source had class names, with captions."""
    store = write_store(tmp_path_factory.mktemp("named"))
    names = ["ant", "bee", "cat", "dog", "eel"]
    account = Account("/x", "folder", num_files=20, num_classes=5, class_names=names).to_dict()
    store.manifest["account"] = account
    (Path(store.uri) / "manifest.json").write_bytes(encode_manifest(store.manifest))
    return store


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_datasets_loads_the_hf_folder(named_store, tmp_path, monkeypatch, dtype):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out"
    written = export(named_store.uri, "hf", str(output), dtype)
    assert written == {"rows": NUM_ROWS, "files": 3}
    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["label"], datasets.ClassLabel)
    assert loaded.features["label"].int2str(loaded[6]["label"]) == "bee"
    assert loaded["key"] == [f"{i:03d}" for i in range(NUM_ROWS)]
    arrays = loaded.with_format("numpy")
    for column in named_store.columns:
        assert loaded.features[column] == datasets.Array3D(SHAPE, dtype)
        values = np.stack([row[column] for row in arrays])
        assert np.array_equal(values, rows_of(named_store, column).astype(dtype))
    stats = json.loads((output / "latent_statistics.json").read_text())
    assert np.allclose(stats["mean"], named_store.stats.mean)
    card = (output / "README.md").read_text()
    assert "20 images planned = 20 stored + 0 errors" in card and "| autoencoder weights |" in card


def test_many_rows_become_several_files(store, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("fae.pipelines.latents.export_tables.ROWS_PER_FILE", 10)
    assert export(store.uri, "hf", str(tmp_path / "out"))["files"] == 4
    files = sorted(path.name for path in (tmp_path / "out/data").iterdir())
    assert files == ["train-00000.parquet", "train-00001.parquet"]
    loaded = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["label"] == [i % 5 for i in range(NUM_ROWS)]


def test_lance_opens_the_export(store, tmp_path):
    import lance

    output = tmp_path / "out"
    assert export(store.uri, "lance", str(output), "float16")["rows"] == NUM_ROWS
    table = lance.dataset(str(output)).to_table()
    assert table["label"].to_pylist() == [i % 5 for i in range(NUM_ROWS)]
    for column in store.columns:
        values = table[column].combine_chunks().to_numpy_ndarray()
        assert np.array_equal(values, rows_of(store, column))
    some = lance.dataset(str(output)).take([17, 2], columns=["key"])
    assert some["key"].to_pylist() == ["017", "002"]


def test_tables_go_to_a_bucket_and_unlabelled_rows_stay(write_store, tmp_path, root):
    import lance

    from fae.pipelines.storage import paths

    plain = write_store(tmp_path / "plain", ("mean",), labels=False)
    export(plain.uri, "lance", paths.join(root, "lance"))
    export(plain.uri, "hf", paths.join(root, "hf"))
    for layout in ("lance", "hf"):
        place = paths.join(root, layout)
        for file in list(paths.list_files(place)):
            copy = tmp_path / "copy" / layout / file.uri.removeprefix(f"{place}/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(paths.read_bytes(file.uri))
    assert lance.dataset(str(tmp_path / "copy/lance")).count_rows("label is null") == NUM_ROWS
    table = pq.read_table(tmp_path / "copy/hf/data/train-00000.parquet")
    assert table["label"].to_pylist() == [None] * NUM_ROWS


def test_a_format_whose_package_is_missing_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'fae-ray\[lance\]'"):
        export(store.uri, "lance", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_page_about_interchange_opens_the_exports(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    export(store.uri, "hf", "latents-hf", "float16")
    export(store.uri, "lance", "latents.lance")
    page = (ROOT / "docs/interchange.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    namespace: dict[str, object] = {}
    exec(next(block for block in blocks if "import lance" in block), namespace)
    assert np.array_equal(namespace["latent"], store.read_shard(0)["mean"][0])
    assert namespace["table"]["key"].to_pylist() == ["000", "001"]
