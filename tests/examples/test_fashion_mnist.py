"""The script that converts Fashion-MNIST, run on small idx files of the same format."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from examples.fashion_mnist import read_idx
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.sources import list_images
from tests.tiny import ROOT

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([9, 0, 3, 3, 1], np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", IMAGES)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", LABELS)
    return folder


def run(output: Path, source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "examples/fashion_mnist.py"), str(output)]
    command = [*script, "--source", str(source), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_writes_what_the_recipe_reads(source: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "fashion", source, "--train", "3")
    assert done.returncode == 0, done.stderr
    assert "train.parquet: 3 images" in done.stdout and "test.parquet: 5 images" in done.stdout
    for split, count in (("train", 3), ("test", 5)):
        path = tmp_path / "fashion" / f"{split}.parquet"
        files = pq.read_table(path)["image"].to_pylist()
        pictures = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
        np.testing.assert_array_equal(pictures, IMAGES[:count])
        records = list_images(load_recipe("fashion-dinov2s", [f"data.path={path}"]).data)
        assert [(r.key, r.label) for r in records] == [
            (f"{split}/{i:05d}", int(label)) for i, label in enumerate(LABELS[:count])
        ]


def test_a_missing_file_is_named_without_a_traceback(tmp_path: Path) -> None:
    done = run(tmp_path / "fashion", tmp_path / "nowhere")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train-images-idx3-ubyte.gz does not exist" in done.stderr
    assert "apt-get install dataset-fashion-mnist" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x08\x01", "not a complete gzip file"),
        (gzip.compress(bytes(100), mtime=0)[:-12], "not a complete gzip file"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(8), mtime=0), "not an idx file of bytes"),
        (gzip.compress(b"\x00\x00\x08\x03" + bytes(4), mtime=0), "not an idx file of bytes"),
        (
            gzip.compress(struct.pack(">HBBI", 0, 8, 1, 5) + bytes(4), mtime=0),
            r"4 bytes for the shape \[5\]",
        ),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "x.gz")
