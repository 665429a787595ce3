"""Convert Fashion-MNIST's idx files, from Debian's package `dataset-fashion-mnist`, to Parquet.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py fashion [--source FOLDER] [--train 20000] [--test 10000]

Writes OUTPUT/train.parquet and OUTPUT/test.parquet with the columns key, image (PNG) and label,
which the recipe fashion-dinov2s reads. `--train` and `--test` keep the first images of each file;
these are mixed in class. Without root, run `apt-get download dataset-fashion-mnist`, unpack the
package with `dpkg-deb -x` and give the folder of the idx files as `--source`.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "test": "t10k"}
"""The first part of the idx files' names, by split."""


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file; its header gives the shape.

    Raises FileNotFoundError, and ValueError for another kind of file or an incomplete one.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Run apt-get install dataset-fashion-mnist, or give --source."
        )
    try:
        data = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}.") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is not an idx file of bytes.")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {values.size} bytes for the shape {shape.tolist()}.")
    return values.reshape(shape)


def convert(source: Path, output: Path, limits: Mapping[str, int]) -> dict[str, int]:
    """Write OUTPUT/SPLIT.parquet for each split of `limits`; returns the number of rows of each.

    `limits` gives the largest number of images, `source` is the folder of the idx files. Raises
    what `read_idx` raises.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for split, limit in limits.items():
        images = read_idx(source / f"{FILES[split]}-images-idx3-ubyte.gz")[:limit]
        labels = read_idx(source / f"{FILES[split]}-labels-idx1-ubyte.gz")[:limit]
        table = pa.table(
            {
                "key": [f"{split}/{i:05d}" for i in range(len(images))],
                "image": pa.array([_png(image) for image in images], pa.binary()),
                "label": pa.array(labels, pa.int64()),
            }
        )
        pq.write_table(table, output / f"{split}.parquet", row_group_size=1024)
        rows[split] = len(images)
    return rows


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for train.parquet and test.parquet")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the idx files")
    parser.add_argument("--train", type=int, default=20_000, help="largest number of images")
    parser.add_argument("--test", type=int, default=10_000, help="largest number of images")
    arguments = parser.parse_args()
    limits = {"train": arguments.train, "test": arguments.test}
    try:
        rows = convert(arguments.source, arguments.output, limits)
    except (OSError, ValueError) as error:
        sys.exit(f"fashion_mnist: {error}")
    for split, count in rows.items():
        print(f"{arguments.output}/{split}.parquet: {count} images")


if __name__ == "__main__":
    main()
