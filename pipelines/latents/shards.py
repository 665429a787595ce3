"""The shards of a latent store: one Parquet object each, written whole, and their errors.

```
plan.parquet               immutable: shard, key, uri, label, caption; sorted by key
shards/00000042.parquet    key, label, caption and the latents of shard 42, written whole
errors/00000042.parquet    key, stage, message of its failed images; absent where there are none
manifest.json              written once, last (manifest.py names one exception); readers trust it
```
Latents are uncompressed in one page a shard, so a row is one range of the file (`offsets` in the
manifest), while any Parquet reader sees `arrow.fixed_shape_tensor<float16>`. plan.py and
manifest.py hold the other files; reader.py reads them all.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fae_core.latent_stats import ChannelStats

from ..data.records import ImageRecord, batched
from ..storage import paths
from .plan import FORMAT, TEXT_FORMAT
from .token_states import STATES, TokenStates

LATENT_COLUMNS = ("mean", "logvar", "mean_flip", "logvar_flip")
THREADS = 16
SHARDS_AT_ONCE = 2048
"""Shards that are described together when a store is committed."""
WORD_COLUMNS = {
    "key": pa.string(),
    "label": pa.int64(),
    "caption": pa.string(),
    "captions": pa.list_(pa.string()),
}
"""Cast to these before a value is looked at: those of some extension types would run code."""
_NAME = re.compile(r"\d{8,}\.parquet")
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or what spreads its calls over a cluster and gives their results in order."""
_ERROR_SCHEMA = pa.schema([("key", pa.string()), ("stage", pa.string()), ("message", pa.string())])
# One data page a column: Parquet's own limits are set out of reach.
_ONE_PAGE = {"data_page_size": 2**31 - 1, "max_rows_per_page": 2**31 - 1}


def shard_uri(uri: str, index: int) -> str:
    """Address of shard `index` of the store `uri`."""
    return paths.join(uri, "shards", f"{index:08d}.parquet")


def errors_uri(uri: str, index: int) -> str:
    """Address of the errors of shard `index`; the file exists only where there are errors."""
    return paths.join(uri, "errors", f"{index:08d}.parquet")


def files_in(uri: str, folder: str) -> dict[str, paths.FileInfo]:
    """The files in `folder`, "shards" or "errors", by name.

    The hidden temporary files that a killed writer left on a local disk are no part of the store.
    """
    found = {f.uri.rpartition("/")[2]: f for f in paths.list_files(paths.join(uri, folder))}
    return {
        name: file
        for name, file in found.items()
        if not (name.startswith(".") and name.endswith(paths.TEMPORARY_SUFFIX))
    }


def write_shard(
    uri: str,
    index: int,
    records: Sequence[ImageRecord],
    kept: Sequence[int],
    latents: Mapping[str, np.ndarray | TokenStates],
    errors: Sequence[Mapping[str, str]],
    fingerprint: str,
    with_captions: bool = False,
) -> str:
    """Write shard `index` and its errors; returns the shard's ETag.

    `records` is the plan's shard, `kept` the places of those that have latents (float16 [n, C, H,
    W] each) or TokenStates, `errors` the others' key, stage and message. Writing again replaces a
    file by the same bytes. The errors come first: a shard that is there has its errors beside it.
    Raises ValueError where an image is in both places or in none.
    """
    accounted = sorted([records[i].key for i in kept] + [e["key"] for e in errors])
    if accounted != sorted(r.key for r in records):
        raise ValueError(
            f"Shard {index}: {len(records)} images planned, but latents and errors do not name "
            "each once."
        )
    if errors:
        table = pa.Table.from_pylist(sorted((dict(e) for e in errors), key=lambda e: e["key"]))
        buffer = io.BytesIO()
        pq.write_table(table.cast(_ERROR_SCHEMA), buffer, compression="zstd")
        paths.write_bytes(errors_uri(uri, index), buffer.getvalue())
    elif paths.exists(errors_uri(uri, index)):
        paths.delete(errors_uri(uri, index))
    rows = [records[i] for i in kept]
    data = encode_shard(index, rows, latents, len(errors), fingerprint, with_captions)
    return paths.write_bytes(shard_uri(uri, index), data)


def encode_shard(
    index: int,
    records: Sequence[ImageRecord],
    latents: Mapping[str, np.ndarray | TokenStates],
    num_errors: int,
    fingerprint: str,
    with_captions: bool = False,
) -> bytes:
    """The Parquet bytes of a shard: the same for the same input and version of pyarrow.

    `with_captions` adds the column `captions`, all captions of images that have several.
    """
    statistics = {}
    columns: dict[str, Any] = {
        "key": pa.array([r.key for r in records], pa.string()),
        "label": pa.array([r.label for r in records], pa.int64()),
        "caption": pa.array([r.caption for r in records], pa.string()),
    }
    if with_captions:
        columns["captions"] = pa.array([r.captions for r in records], WORD_COLUMNS["captions"])
    stored: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {"format": FORMAT}
    for name, values in latents.items():
        if len(values) != len(records):
            raise ValueError(
                f"Shard {index}: {len(values)} rows of {name} for {len(records)} keys."
            )
        if isinstance(values, TokenStates):
            columns |= values.columns()
            notes = {"format": TEXT_FORMAT, **values.notes()}
            stored[STATES] = values.values
            continue
        values = stored[name] = np.ascontiguousarray(values, np.float16)
        stats = ChannelStats.empty(values.shape[1])
        stats.update(np.moveaxis(values, 1, -1))
        statistics[name] = stats.to_dict()
        columns[name] = _tensor_array(values)
    info = {
        **notes,
        "shard": index,
        "fingerprint": fingerprint,
        "errors": num_errors,
        "statistics": statistics,
    }
    table = pa.table(columns).replace_schema_metadata({"fae": json.dumps(info)})
    buffer = io.BytesIO()
    compression = {name: "none" if name in stored else "zstd" for name in columns}
    options: dict[str, Any] = {"compression": compression, **_ONE_PAGE}
    pq.write_table(
        table,
        buffer,
        row_group_size=max(len(records), 1),
        use_dictionary=False,
        write_statistics=["key"],
        write_page_checksum=True,
        **options,
    )
    data = buffer.getvalue()
    metadata = pq.read_metadata(io.BytesIO(data))
    offsets = value_offsets(metadata, {name: values.nbytes for name, values in stored.items()})
    for name, values in stored.items():
        start = offsets[name]
        if data[start : start + values.nbytes] != values.tobytes():
            raise AssertionError(f"Parquet did not lay {name} out in one page.")
    return data


def _tensor_array(values: np.ndarray) -> pa.Array:
    shape = values.shape[1:]
    storage_array = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), int(np.prod(shape))
    )
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), shape), storage_array)


def value_offsets(metadata: pq.FileMetaData, sizes: Mapping[str, int]) -> dict[str, int]:
    """Byte offset in the file of the values of each column that `sizes` [bytes] names.

    They are the end of the column's one page.
    """
    offsets = {}
    if metadata.num_row_groups == 0:
        return dict.fromkeys(sizes, 0)
    group = metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        name = column.path_in_schema.partition(".")[0]
        if name in sizes:
            offsets[name] = column.data_page_offset + column.total_compressed_size - sizes[name]
    return offsets


def captions_of(table: pa.Table) -> list[tuple[str, ...]]:
    """All captions of each row, from the column `caption` and, where it is there, `captions`."""
    names = [name for name in ("caption", "captions") if name in table.column_names]
    words = {name: table[name].cast(WORD_COLUMNS[name]).to_pylist() for name in names}
    several = words.get("captions", [None] * len(table))
    return [
        tuple(many) if many else (one,) if one is not None else ()
        for one, many in zip(words["caption"], several, strict=True)
    ]


def read_errors(uri: str, each: Each = map) -> Iterator[dict[str, str]]:
    """Every recorded error (key, stage, message) in shard order; `each` as for `commit`."""
    return (row for _, rows in errors_by_shard(error_files(uri), each) for row in rows)


def error_files(uri: str) -> dict[int, paths.FileInfo]:
    """The errors files by shard, of the shards that have one."""
    files = files_in(uri, "errors").items()
    return {int(name.partition(".")[0]): file for name, file in files if _NAME.fullmatch(name)}


def errors_by_shard(
    files: Mapping[int, paths.FileInfo], each: Each = map
) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """(shard, its errors) of `error_files`, in order; `each` as for `commit`.

    A file that was deleted after it was listed has none.
    """
    addresses = [(shard, file.uri) for shard, file in sorted(files.items())]
    for some in each(_read_error_files, batched(addresses, SHARDS_AT_ONCE)):
        yield from some


def _read_error_files(
    files: Sequence[tuple[int, str]],
) -> list[tuple[int, list[dict[str, str]]]]:
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(_errors_if_there, (uri for _, uri in files))
        return [(shard, rows) for (shard, _), rows in zip(files, read, strict=True)]


def _errors_if_there(uri: str) -> list[dict[str, str]]:
    try:
        return read_shard_errors(uri)
    except paths.FileError:
        if paths.exists(uri):
            raise
        return []


def delete_shard(uri: str, index: int, errors: paths.FileInfo) -> bool:
    """Delete shard `index` and then its errors: a shard that is there has its errors beside it.

    Returns whether it did: not where the errors file is no longer `errors`, as it was listed.
    """
    if next(paths.list_files(errors_uri(uri, index)), None) != errors:
        return False
    paths.delete(shard_uri(uri, index))
    paths.delete(errors_uri(uri, index))
    return True


def read_shard_errors(uri: str) -> list[dict[str, str]]:
    """Key, stage and message of the failed images in the errors file `uri`."""
    table = pq.read_table(pa.BufferReader(paths.read_bytes(uri)))
    rows: list[dict[str, str]] = table.select(_ERROR_SCHEMA.names).cast(_ERROR_SCHEMA).to_pylist()
    return rows


def tensor_values(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-shape tensor column as float16 [n, C, H, W]."""
    shape = tuple(column.type.shape)
    parts = [chunk.storage.flatten().to_numpy() for chunk in column.chunks]
    flat = np.concatenate(parts) if parts else np.empty(0, np.float16)
    return flat.reshape(-1, *shape)
