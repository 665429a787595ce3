"""Exports, read back as their users' loaders read them."""

from __future__ import annotations

import io
import json
import tarfile
from glob import glob

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fae.pipelines.latents.export_layouts import ExportError, export

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
