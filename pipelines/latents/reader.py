"""A finished latent store: read whole, through Ray Data, or for training in a seeded order.

Training reads rows, not files: each latent is one range of its shard (shards.py), so a batch of a
permutation over the whole store reads only its own bytes, from a local disk or by ranged requests
from S3, many at a time. No host copies more than its workers' share; a cache folder of whole
shards, one for all workers of a host, is the caller's choice.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fae_core.draws import sample_generator
from fae_core.latent_stats import ChannelStats

from ..data import EpochOrder
from ..data.account import Account
from ..storage import StoreError, paths
from .manifest import read_manifest
from .plan import open_plan
from .shards import LATENT_COLUMNS, WORD_COLUMNS, read_errors, shard_uri, tensor_values

NO_LABEL = -1
_MAY_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
OPEN_SHARDS = 4096 if _MAY_OPEN == resource.RLIM_INFINITY else min(4096, _MAY_OPEN // 4)
READS_IN_FLIGHT = 32
ANNOUNCED_ROWS = 4096
"""Rows that the local disk is told of before they are read: the more, the better it orders them."""


@dataclass(frozen=True)
class LatentBatch:
    """What the training reader yields.

    `latents[column]` float16 [n, C, H, W] as stored (not normalized); `labels` int64 [n], NO_LABEL
    where there is none; `rows` int64 [n] in the store's order; `epochs` int64 [n]. `captions` are
    one of each image, None where there is none; the whole is None unless they were asked for.
    """

    step: int
    latents: dict[str, np.ndarray]
    labels: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray
    captions: list[str | None] | None = None


class LatentStore:
    """A finished store and its rows.

    It has `manifest`, `stats` of the column mean, `columns` and `latent_shape` (C, H, W).
    """

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.columns: list[str] = manifest["columns"]
        self.latent_shape: tuple[int, int, int] = tuple(manifest["latent_shape"])
        self.stats = ChannelStats.from_dict(manifest["statistics"][self.columns[0]])
        self.num_rows = np.array([entry["rows"] for entry in manifest["shards"]], np.int64)
        self.ends_with = np.cumsum(self.num_rows)

    @classmethod
    def open(cls, uri: str) -> LatentStore:
        """Open a finished store. Raises StoreError where there is none or it is not finished."""
        manifest = read_manifest(uri)
        if manifest is None:
            planned = paths.exists(paths.join(uri, "plan.parquet"))
            why = (
                "its precompute has not finished; run the same command again"
                if planned
                else "there is no store"
            )
            raise StoreError(f"{uri} has no manifest.json: {why}.")
        return cls(uri, manifest)

    def __len__(self) -> int:
        return int(self.manifest["stored"])

    @property
    def account(self) -> Account | None:
        """The account of the source of its images, None in stores without one."""
        found = self.manifest.get("account")
        return Account.from_dict(found) if found else None

    @property
    def class_names(self) -> list[str]:
        """The names of the classes by their numbers, empty where they have none."""
        return self.account.class_names if self.account else []

    @property
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    def labels(self) -> Iterator[tuple[str, int | None]]:
        """(key, label) of every stored image in key order, from the plan and the error files."""
        failed = self._failed()
        return (row for row in open_plan(self.uri).labels() if row[0] not in failed)

    def captions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(key, captions) of every stored image in key order; without one they are empty."""
        failed = self._failed()
        return (row for row in open_plan(self.uri).captions() if row[0] not in failed)

    def _failed(self) -> set[str]:
        """Keys of the planned images that could not be encoded."""
        if self.manifest["stored"] == self.manifest["planned"]:
            return set()
        return {error["key"] for error in read_errors(self.uri)}

    def read_shard(self, index: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Shard `index`: key, label, caption as lists, each latent column float16 [n, C, H, W]."""
        table = pq.read_table(
            pa.BufferReader(paths.read_bytes(shard_uri(self.uri, index))),
            columns=None if columns is None else list(columns),
        )
        return {
            name: tensor_values(table[name])
            if name in LATENT_COLUMNS
            else table[name].cast(WORD_COLUMNS[name]).to_pylist()
            for name in table.column_names
        }

    def to_ray_dataset(self, columns: Sequence[str] | None = None) -> Any:
        """A Ray data set of the store's rows; latents arrive as float16 arrays [C, H, W]."""
        import ray.data

        if not len(self):
            raise StoreError(f"{self.uri} stores no latents.")
        filesystem, _ = paths.filesystem(self.uri)
        files = [
            paths.filesystem(shard_uri(self.uri, index))[1]
            for index, entry in enumerate(self.manifest["shards"])
            if entry["rows"]
        ]
        dataset = ray.data.read_parquet(files, filesystem=filesystem)
        return dataset if columns is None else dataset.select_columns(list(columns))

    def reader(
        self,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        columns: Sequence[str] = ("mean",),
        cache: str | None = None,
        captions: bool = False,
        places: range | None = None,
    ) -> Iterator[LatentBatch]:
        """Batches for ever: worker `rank`'s equal slice of each global batch from `start_step` on.

        `places` in the global batch may be given instead of `rank` and `world_size`. The order is a
        permutation of the whole store each epoch, the same however a batch is sliced; `start_step`
        may lie anywhere in an epoch. With `cache`, a local folder, shards from S3 are copied there
        when first needed. With `captions` batches have them; of an image's several, (seed, epoch,
        row) draw one. Raises ValueError for a batch that does not divide, StoreError for an empty
        store and for a column that is not stored.
        """
        absent = [name for name in columns if name not in self.columns]
        if absent:
            raise StoreError(
                f"{self.uri} stores {', '.join(self.columns)}; not {', '.join(absent)}."
            )
        if not len(self):
            raise StoreError(f"{self.uri} stores no latents.")
        own = _equal_slice(batch_size, rank, world_size) if places is None else places
        order = EpochOrder(len(self), seed)
        rows = _Rows(self, columns, cache)

        def batches() -> Iterator[LatentBatch]:
            ahead: deque[tuple[np.ndarray, np.ndarray]] = deque()
            for step in itertools.count(start_step):
                while len(ahead) <= ANNOUNCED_ROWS // len(own):
                    ahead.append(order.batch(step + len(ahead), batch_size, own))
                    rows.announce(ahead[-1][0])
                items, epochs = ahead.popleft()
                latents, labels = rows.take(items)
                texts = rows.captions(items, epochs, seed) if captions else None
                yield LatentBatch(step, latents, labels, items, epochs, texts)

        return batches()


def _equal_slice(batch_size: int, rank: int, world_size: int) -> range:
    if batch_size % world_size:
        raise ValueError(f"A batch of {batch_size} does not divide among {world_size} workers.")
    size = batch_size // world_size
    return range(rank * size, (rank + 1) * size)


class _Rows:
    """Random access to rows: each is one range of its shard's file, or of its cached copy."""

    def __init__(self, store: LatentStore, columns: Sequence[str], cache: str | None) -> None:
        self.store = store
        self.columns = list(columns)
        self.cache = Path(cache) if cache else None
        self.row_bytes = 2 * int(np.prod(store.latent_shape))
        entries = store.manifest["shards"]
        self.offsets = {
            name: np.array([entry["offsets"][name] for entry in entries], np.int64)
            for name in self.columns
        }
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        # All of them: labels are compressed in one page, and asking again would decode it again.
        self._labels = lru_cache(None)(self._read_labels)
        self._captions = lru_cache(OPEN_SHARDS)(self._read_captions)
        self.remote = paths.is_remote(store.uri) and cache is None
        self._pool = ThreadPoolExecutor(READS_IN_FLIGHT) if self.remote else None

    def announce(self, items: np.ndarray) -> None:
        """Ask the local disk for the rows `items`, so that it reads many at once meanwhile."""
        if self.remote:
            return
        shards, rows = self._places(items)
        for name in self.columns:
            offsets = self.offsets[name][shards] + rows * self.row_bytes
            for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
                file = self._shard(shard)
                assert isinstance(file, _LocalFile)
                file.announce(self.row_bytes, offset)

    def take(self, items: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Latents and labels of the rows `items`, in their order."""
        shards, rows = self._places(items)
        numbers = shards.tolist()
        latents = {}
        for name in self.columns:
            values = np.empty((len(items), *self.store.latent_shape), np.float16)
            offsets = (self.offsets[name][shards] + rows * self.row_bytes).tolist()
            rows_of_bytes = values.view(np.uint8).reshape(-1).data
            targets = [
                rows_of_bytes[start : start + self.row_bytes]
                for start in range(0, values.nbytes, self.row_bytes)
            ]
            self._each(self._read_row, numbers, targets, offsets)
            latents[name] = values
        self._each(self._labels, sorted(set(numbers)))
        labels = [
            self._labels(shard)[row] for shard, row in zip(numbers, rows.tolist(), strict=True)
        ]
        return latents, np.array(labels, np.int64)

    def captions(self, items: np.ndarray, epochs: np.ndarray, seed: int) -> list[str | None]:
        """A caption of each of the rows `items`, in their order."""
        shards, rows = self._places(items)
        numbers = shards.tolist()
        self._each(self._captions, sorted(set(numbers)))
        chosen: list[str | None] = []
        for item, epoch, shard, row in zip(
            items.tolist(), epochs.tolist(), numbers, rows.tolist(), strict=True
        ):
            several = self._captions(shard)[row]
            draw = 0
            if len(several) > 1:
                generator = sample_generator(seed, "caption", epoch, item)
                draw = int(torch.randint(len(several), (), generator=generator))
            chosen.append(several[draw] if several else None)
        return chosen

    def _places(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in it of each item."""
        shards = np.searchsorted(self.store.ends_with, items, side="right")
        return shards, items - (self.store.ends_with[shards] - self.store.num_rows[shards])

    def _each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        return list(
            self._pool.map(function, *arguments) if self._pool else map(function, *arguments)
        )

    def _read_row(self, shard: int, target: memoryview, offset: int) -> None:
        if self._shard(shard).read_into(target, offset) != len(target):
            raise StoreError(
                f"{shard_uri(self.store.uri, shard)} ends before its last row; it was cut after it "
                "was opened. Run fae inspect --verify."
            )

    def _open(self, index: int) -> _RemoteFile | _LocalFile:
        path = self._address(index)
        file = _RemoteFile(path) if paths.is_remote(path) else _LocalFile(path)
        found, entry = file.size(), self.store.manifest["shards"][index]
        if found != entry["bytes"]:
            raise StoreError(
                f"{shard_uri(self.store.uri, index)} is not what the manifest says "
                f"({found} bytes for {entry['bytes']}); run fae inspect --verify."
            )
        return file

    def _read_labels(self, index: int) -> np.ndarray:
        self._shard(index)  # of the right size
        with paths.open_input(self._address(index)) as file:
            column = pq.ParquetFile(file).read(columns=["label"], use_threads=False)["label"]
        labels: np.ndarray = column.fill_null(NO_LABEL).to_numpy()
        # A hundred million labels of a thousand classes are 0.2 GB so, and 0.8 GB as they were.
        smallest = (t for t in (np.int16, np.int32, np.int64) if _all_fit(labels, t))
        return labels.astype(next(smallest))

    def _read_captions(self, index: int) -> list[tuple[str, ...]]:
        """All captions of each row of shard `index`."""
        self._shard(index)  # of the right size
        with paths.open_input(self._address(index)) as file:
            parquet = pq.ParquetFile(file)
            names = ["caption", "captions"][: 1 + ("captions" in parquet.schema_arrow.names)]
            table = parquet.read(columns=names, use_threads=False)
        words = {name: table[name].cast(WORD_COLUMNS[name]).to_pylist() for name in names}
        several = words.get("captions", [None] * len(table))
        return [
            tuple(many) if many else (one,) if one is not None else ()
            for one, many in zip(words["caption"], several, strict=True)
        ]

    def _address(self, index: int) -> str:
        uri = shard_uri(self.store.uri, index)
        if self.cache is None or not paths.is_remote(uri):
            return uri
        folder = self.cache / self.store.manifest["fingerprint"][:16]
        path = folder / f"{self.store.manifest['shards'][index]['etag']}.parquet"
        if not path.exists():
            paths.write_bytes(str(path), paths.read_bytes(uri))
        return str(path)


def _all_fit(values: np.ndarray, dtype: type[np.signedinteger]) -> bool:
    limits = np.iinfo(dtype)
    return not len(values) or bool(values.min() >= limits.min and values.max() <= limits.max)


class _RemoteFile:
    """An object on S3 read at given places: a range request each."""

    def __init__(self, uri: str) -> None:
        self.file = paths.open_input(uri)

    def read_into(self, target: memoryview, offset: int) -> int:
        data = self.file.read_at(len(target), offset)
        target[: len(data)] = data
        return len(data)

    def size(self) -> int:
        return int(self.file.size())


class _LocalFile:
    """A file read at given places; it costs one descriptor, which closes with the object."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(paths.filesystem(path)[1], os.O_RDONLY)

    def announce(self, size: int, offset: int) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, target: memoryview, offset: int) -> int:
        return os.preadv(self.descriptor, [target], offset)

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the file was not there
            os.close(self.descriptor)
