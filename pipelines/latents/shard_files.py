"""The shards of a store as files whose rows are read at random, each from its own bytes.

The readers of latents and of token states share this: a local file costs one descriptor, an object
on S3 a range request a row, and with a cache folder on each host whole objects are copied there
once.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import StoreError, paths
from .shards import shard_uri

_MAY_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
OPEN_SHARDS = 4096 if _MAY_OPEN == resource.RLIM_INFINITY else min(4096, _MAY_OPEN // 4)
READS_IN_FLIGHT = 32


class ShardFiles:
    """The shards of the finished store at `uri`; `cache` is a local folder for those on S3."""

    def __init__(self, uri: str, manifest: dict[str, Any], cache: str | None) -> None:
        self.uri = uri
        self.fingerprint: str = manifest["fingerprint"]
        self.entries: list[dict[str, Any]] = manifest["shards"]
        self.cache = Path(cache) if cache else None
        self.remote = paths.is_remote(uri) and cache is None
        self.num_rows = np.array([entry["rows"] for entry in self.entries], np.int64)
        self.ends_with = np.cumsum(self.num_rows)
        self._file = lru_cache(OPEN_SHARDS)(self._open)
        self._pool = ThreadPoolExecutor(READS_IN_FLIGHT) if self.remote else None

    def places(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in it of each row of the store."""
        shards = np.searchsorted(self.ends_with, items, side="right")
        return shards, items - (self.ends_with[shards] - self.num_rows[shards])

    def each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """`map`, with many calls at once where they wait for S3."""
        return list(
            self._pool.map(function, *arguments) if self._pool else map(function, *arguments)
        )

    def announce(self, shard: int, size: int, offset: int) -> None:
        """Ask the local disk for bytes that will be read soon."""
        file = self._file(shard)
        if isinstance(file, _LocalFile):
            file.announce(size, offset)

    def read_into(self, shard: int, target: memoryview, offset: int) -> None:
        """Fill `target` with the shard's bytes from `offset` on. Raises StoreError."""
        if self._file(shard).read_into(target, offset) != len(target):
            raise StoreError(
                f"{shard_uri(self.uri, shard)} ends before its last row; it was cut after it "
                "was opened. Run fae inspect --verify."
            )

    def columns(self, shard: int, names: Sequence[str]) -> pa.Table:
        """Those of the columns `names` that the shard has. Raises StoreError."""
        self._file(shard)  # of the right size
        with paths.open_input(self._address(shard)) as file:
            parquet = pq.ParquetFile(file)
            there = [name for name in names if name in parquet.schema_arrow.names]
            return parquet.read(columns=there, use_threads=False)

    def _open(self, index: int) -> _RemoteFile | _LocalFile:
        path = self._address(index)
        file = _RemoteFile(path) if paths.is_remote(path) else _LocalFile(path)
        found, entry = file.size(), self.entries[index]
        if found != entry["bytes"]:
            raise StoreError(
                f"{shard_uri(self.uri, index)} is not what the manifest says "
                f"({found} bytes for {entry['bytes']}); run fae inspect --verify."
            )
        return file

    def _address(self, index: int) -> str:
        uri = shard_uri(self.uri, index)
        if self.cache is None or not paths.is_remote(uri):
            return uri
        folder = self.cache / self.fingerprint[:16]
        path = folder / f"{self.entries[index]['etag']}.parquet"
        if not path.exists():
            paths.write_bytes(str(path), paths.read_bytes(uri))
        return str(path)


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
