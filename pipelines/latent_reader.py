"""Reading a finished latent store: whole, through Ray Data, or for training in a seeded order of all its rows.

Training reads rows, not files: each latent is one range of its shard (latent_store.py), memory-mapped, so a batch of a
permutation over the whole store touches only its own bytes. Shards on S3 come to a local folder when first needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fae_core.latent_stats import ChannelStats
from pipelines import latent_store, storage
from pipelines.epoch_order import EpochOrder
from pipelines.latent_store import StoreError

NO_LABEL = -1


@dataclass(frozen=True)
class LatentBatch:
    """What the training reader yields.

    `latents[column]` float16 [n, C, H, W] as stored (not normalised); `labels` int64 [n], NO_LABEL where there is none;
    `rows` int64 [n] in the store's order; `epochs` int64 [n].
    """

    step: int
    latents: dict[str, np.ndarray]
    labels: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray


class LatentStore:
    """A finished store: `manifest`, `stats` of the column mean, `columns`, `latent_shape` (C, H, W), and its rows."""

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.columns: list[str] = manifest["columns"]
        self.latent_shape: tuple[int, int, int] = tuple(manifest["latent_shape"])
        self.stats = ChannelStats.from_dict(manifest["statistics"][self.columns[0]])
        self._ends = np.cumsum([entry["rows"] for entry in manifest["shards"]])

    @classmethod
    def open(cls, uri: str) -> LatentStore:
        """Open a finished store. Raises StoreError where there is none, or where precompute has not finished it."""
        manifest = latent_store.read_manifest(uri)
        if manifest is None:
            planned = storage.exists(storage.join(uri, "plan.parquet"))
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
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    def read_shard(self, index: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Shard `index` whole: key, label, caption as lists, each latent column float16 [n, C, H, W]."""
        table = pq.read_table(
            pa.BufferReader(storage.read_bytes(latent_store.shard_uri(self.uri, index))),
            columns=None if columns is None else list(columns),
        )
        return {
            name: latent_store.tensor_values(table[name])
            if name in latent_store.LATENT_COLUMNS
            else table[name].to_pylist()
            for name in table.column_names
        }

    def to_ray_dataset(self, columns: Sequence[str] | None = None) -> Any:
        """A Ray data set of the store's rows; latents arrive as float16 arrays [C, H, W]."""
        import ray.data

        filesystem, _ = storage.filesystem(self.uri)
        paths = [
            storage.filesystem(latent_store.shard_uri(self.uri, index))[1]
            for index, entry in enumerate(self.manifest["shards"])
            if entry["rows"]
        ]
        dataset = ray.data.read_parquet(paths, filesystem=filesystem)
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
    ) -> Iterator[LatentBatch]:
        """Batches for ever: worker `rank`'s equal slice of the global batches of `batch_size` from `start_step` on.

        The order is a permutation of the whole store each epoch, the same for any `world_size`; `start_step` may lie
        anywhere in an epoch. `cache` is the folder for shards from S3 (a temporary one otherwise). Raises ValueError
        for an empty store or a batch that does not divide, StoreError for a column that is not stored.
        """
        absent = [name for name in columns if name not in self.columns]
        if absent:
            raise StoreError(
                f"{self.uri} stores {', '.join(self.columns)}; not {', '.join(absent)}."
            )
        order = EpochOrder(len(self), seed)
        order.batch(start_step, batch_size, rank, world_size)
        rows = _Rows(self, columns, cache)

        def batches() -> Iterator[LatentBatch]:
            step = start_step
            while True:
                items, epochs = order.batch(step, batch_size, rank, world_size)
                latents, labels = rows.take(items)
                yield LatentBatch(step, latents, labels, items, epochs)
                step += 1

        return batches()


class _Rows:
    """Random access to rows: maps of the shard files, opened when first touched."""

    def __init__(self, store: LatentStore, columns: Sequence[str], cache: str | None) -> None:
        self.store = store
        self.columns = list(columns)
        self._temporary = None
        if storage.is_s3(store.uri) and cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fae-latents-")
            cache = self._temporary.name
        self.cache = Path(cache) if cache else None
        self._open = lru_cache(maxsize=4096)(self._map)

    def take(self, items: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Latents and labels of the rows `items`, in their order."""
        shape = (len(items), *self.store.latent_shape)
        latents = {name: np.empty(shape, np.float16) for name in self.columns}
        labels = np.empty(len(items), np.int64)
        shards = np.searchsorted(self.store._ends, items, side="right")
        for shard in np.unique(shards):
            places = np.nonzero(shards == shard)[0]
            start = self.store._ends[shard] - self.store.manifest["shards"][shard]["rows"]
            rows = items[places] - start
            maps, shard_labels = self._open(int(shard))
            for name in self.columns:
                latents[name][places] = maps[name][rows]
            labels[places] = shard_labels[rows]
        return latents, labels

    def _map(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        entry = self.store.manifest["shards"][index]
        path = self._local_path(index)
        if path.stat().st_size != entry["bytes"]:
            raise StoreError(
                f"{latent_store.shard_uri(self.store.uri, index)} is not what the manifest says "
                f"({path.stat().st_size} bytes for {entry['bytes']}); run fae inspect --verify."
            )
        shape = (entry["rows"], *self.store.latent_shape)
        maps: dict[str, np.ndarray] = {
            name: np.memmap(path, np.float16, "r", offset=entry["offsets"][name], shape=shape)
            for name in self.columns
        }
        labels = pq.read_table(path, columns=["label"])["label"].fill_null(NO_LABEL).to_numpy()
        return maps, labels

    def _local_path(self, index: int) -> Path:
        uri = latent_store.shard_uri(self.store.uri, index)
        if not storage.is_s3(uri):
            return Path(storage.filesystem(uri)[1])
        assert self.cache is not None
        folder = self.cache / self.store.manifest["fingerprint"][:16]
        path = folder / f"{self.store.manifest['shards'][index]['etag']}.parquet"
        if not path.exists():
            storage.write_bytes(str(path), storage.read_bytes(uri))
        return path
