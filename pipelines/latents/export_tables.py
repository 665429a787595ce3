"""`fae export --format hf` and `--format lance`: a latent store as a table that other readers open.

hf: Parquet files and a card (README.md), as `datasets.load_dataset` and the Hugging Face Hub read
them: latents are Array3D, labels ClassLabel where the classes have names. lance: a Lance data set
whose latents are `arrow.fixed_shape_tensor`. Both hold every column of the store, raw, and the
statistics that normalize latents.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ..storage import paths
from .reader import LatentStore
from .shards import LATENT_COLUMNS, WORD_COLUMNS

ROWS_PER_FILE = 10_000
ROWS_PER_GROUP = 1_000
STATISTICS = "latent_statistics.json"


def stored_shards(store: LatentStore) -> Iterator[dict[str, Any]]:
    """The columns of every shard that has rows."""
    for index in range(store.num_shards):
        if store.manifest["shards"][index]["rows"]:
            yield store.read_shard(index)


def write_hf(store: LatentStore, output: str, dtype: np.dtype[Any]) -> int:
    """Write Parquet files of about ROWS_PER_FILE rows and a card; returns the number of files."""
    files, names = 0, list[str]()
    shards = stored_shards(store)
    while (shard := next(shards, None)) is not None:
        uri = paths.join(output, "data", f"train-{files:05d}.parquet")
        names = list(shard)
        schema = _hf_schema(store, names, dtype)
        with paths.writing(uri) as path, pq.ParquetWriter(path, schema) as writer:
            rows = 0
            while shard is not None:
                columns = [_hf_column(shard, name, dtype) for name in names]
                table = pa.table(columns, schema=schema)
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
                rows += len(table)
                shard = next(shards, None) if rows < ROWS_PER_FILE else None
        files += 1
    _write_statistics(store, output)
    paths.write_bytes(paths.join(output, "README.md"), _card(store, names, dtype).encode())
    return files + 2


def write_lance(store: LatentStore, output: str, dtype: np.dtype[Any]) -> int:
    """Write one Lance data set; returns the number of files. Needs the package pylance."""
    import lance

    shards = stored_shards(store)
    first = next(shards)
    schema = _lance_batch(first, dtype).schema

    def batches() -> Iterator[pa.RecordBatch]:
        yield _lance_batch(first, dtype)
        for shard in shards:
            yield _lance_batch(shard, dtype)

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    with ExitStack() as stack:
        remote = paths.is_remote(output)
        place = (
            stack.enter_context(tempfile.TemporaryDirectory())
            if remote
            else paths.filesystem(output)[1]
        )
        folder = Path(place) / "store" if remote else Path(place)
        lance.write_dataset(reader, str(folder))
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in found if remote else ():
            with paths.writing(paths.join(output, path.relative_to(folder).as_posix())) as copy:
                shutil.move(path, copy)
    _write_statistics(store, output)
    return len(found) + 1


def _hf_schema(store: LatentStore, names: list[str], dtype: np.dtype[Any]) -> pa.Schema:
    """The columns' types; latents are lists of lists of lists."""
    latents = pa.from_numpy_dtype(dtype)
    for _ in store.latent_shape:
        latents = pa.list_(latents)
    return pa.schema(
        [(name, latents if name in LATENT_COLUMNS else WORD_COLUMNS[name]) for name in names]
    )


def _features(store: LatentStore, names: list[str], dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """The columns in the words of a card's dataset_info."""
    classes = {str(number): name for number, name in enumerate(store.class_names)}
    kinds: dict[str, Any] = {
        "key": {"dtype": "string"},
        "label": {"dtype": {"class_label": {"names": classes}} if classes else "int64"},
        "caption": {"dtype": "string"},
        "captions": {"list": "string"},
    }
    array = {"dtype": {"array3_d": {"dtype": dtype.name, "shape": list(store.latent_shape)}}}
    return [{"name": name, **kinds.get(name, array)} for name in names]


def _hf_column(shard: dict[str, Any], name: str, dtype: np.dtype[Any]) -> pa.Array:
    """A column; latents [n, C, H, W] as lists of lists of lists."""
    if name not in LATENT_COLUMNS:
        return pa.array(shard[name], WORD_COLUMNS[name])
    values = np.ascontiguousarray(shard[name], dtype)
    nested = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        ends = np.arange(0, len(nested) + 1, size, dtype=np.int32)
        nested = pa.ListArray.from_arrays(ends, nested)
    return nested


def _lance_batch(shard: dict[str, Any], dtype: np.dtype[Any]) -> pa.RecordBatch:
    return pa.record_batch(
        {
            name: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values, dtype))
            if name in LATENT_COLUMNS
            else pa.array(values, WORD_COLUMNS[name])
            for name, values in shard.items()
        }
    )


def _write_statistics(store: LatentStore, output: str) -> None:
    stats = {"mean": store.stats.mean.tolist(), "std": store.stats.std.tolist()}
    paths.write_bytes(paths.join(output, STATISTICS), json.dumps(stats, indent=1).encode())


def _card(store: LatentStore, names: list[str], dtype: np.dtype[Any]) -> str:
    """The README.md of the data set: what the Hub shows, and how to load it."""
    head = {
        "tags": ["fae", "latents", "arxiv:2512.07829"],
        "dataset_info": {"features": _features(store, names, dtype)},
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
    }
    parts, manifest = store.manifest["parts"], store.manifest
    shape = " × ".join(map(str, store.latent_shape))
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        "# Latents of a Feature Auto-Encoder\n",
        f"{len(store):,} images as latents of [FAE](https://arxiv.org/abs/2512.07829), {shape}, "
        f"{dtype.name}, in the columns {', '.join(f'`{name}`' for name in store.columns)}. They "
        "are raw: `latent_statistics.json` has the mean and the standard deviation of each "
        "channel, with which a generator normalizes them.\n",
        f"{manifest['planned']:,} images planned = {manifest['stored']:,} stored + "
        f"{manifest['errors']:,} errors.\n",
        "| made with | |\n|---|---|",
        *(f"| {name} | `{value}` |" for name, value in sorted(parts.items())),
        "\n```python\nfrom datasets import load_dataset\n",
        'latents = load_dataset("FOLDER or OWNER/NAME", split="train").with_format("numpy")',
        "```\n",
    ]
    return "\n".join(lines)
