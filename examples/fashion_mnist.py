"""Fashion-MNIST's idx files, as Debian's package `dataset-fashion-mnist` holds them, to Parquet files of PNG images.

    apt-get install dataset-fashion-mnist
    python -m pipelines.fashion_mnist fashion [--source FOLDER] [--train 20000] [--test 10000]

Writes OUTPUT/train.parquet and OUTPUT/test.parquet (key, image, label): the recipe fashion-dinov2s reads them. A smaller
`--train` keeps the first images, whose classes are mixed. Without root: `apt-get download` and `dpkg-deb -x` anywhere.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pipelines.command import guarded

from fae_core.errors import UserError

SOURCE = "/usr/share/datasets/fashion-mnist"
CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file. Raises UserError for a file that is not there or is something else."""
    if not path.is_file():
        raise UserError(f"{path} is not there: apt-get install dataset-fashion-mnist, or --source.")
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is no idx file of bytes.")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape, dtype=np.int64):
        raise UserError(f"{path} holds {values.size} bytes for shape {shape.tolist()}.")
    return values.reshape(shape)


def convert(source: str, output: str, limits: dict[str, int]) -> dict[str, int]:
    """Write OUTPUT/SPLIT.parquet for each split of `limits`; returns the rows of each."""
    Path(output).mkdir(parents=True, exist_ok=True)
    rows = {}
    for split, limit in limits.items():
        stem = Path(source) / FILES[split]
        images = read_idx(stem.with_name(stem.name + "-images-idx3-ubyte.gz"))[:limit]
        labels = read_idx(stem.with_name(stem.name + "-labels-idx1-ubyte.gz"))[:limit]
        table = pa.table(
            {
                "key": [f"{split}/{i:05d}" for i in range(len(images))],
                "image": pa.array([_png(image) for image in images], pa.binary()),
                "label": pa.array(labels, pa.int64()),
            }
        )
        pq.write_table(table, Path(output) / f"{split}.parquet", row_group_size=1024)
        rows[split] = len(images)
    return rows


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> int:
    """The command of the module's docstring; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output")
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=10_000)
    arguments = parser.parse_args()

    def job() -> None:
        limits = {"train": arguments.train, "test": arguments.test}
        for split, count in convert(arguments.source, arguments.output, limits).items():
            print(f"{arguments.output}/{split}.parquet: {count} images")

    return guarded(job)


if __name__ == "__main__":
    sys.exit(main())
