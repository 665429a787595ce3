"""A finished latent store: read whole, through Ray Data, or for training in a seeded order.

Training reads rows, not files: each latent is one range of its shard (shards.py), so a batch of a
permutation over the whole store reads only its own bytes, from a local disk or by ranged requests
from S3, many at a time. No host copies more than its workers' share; a cache folder of whole
shards, one for all workers of a host, is the caller's choice.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fae_core.latent_stats import ChannelStats

from ..data import EpochOrder
from ..data.account import Account
from ..storage import StoreError, paths
from .manifest import finished_manifest
from .plan import open_plan
from .shard_files import OPEN_SHARDS, ShardFiles
from .shards import (
    LATENT_COLUMNS,
    WORD_COLUMNS,
    captions_of,
    read_errors,
    shard_uri,
    tensor_values,
)
from .text_store import StateRows, TextStore, caption_number
from .verify import verify_store

NO_LABEL = -1
ANNOUNCED_ROWS = 4096
"""Rows that the local disk is told of before they are read: the more, the better it orders them."""


@dataclass(frozen=True)
class LatentBatch:
    """What the training reader yields.

    `latents[column]` float16 [n, C, H, W] as stored (not normalized); `labels` int64 [n], NO_LABEL
    where there is none; `rows` int64 [n] in the store's order; `epochs` int64 [n]. `captions` are
    one of each image, None where there is none, and `states` float16 [L, D] those of the tokens of
    one; the whole is None unless they were asked for.
    """

    step: int
    latents: dict[str, np.ndarray]
    labels: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray
    captions: list[str | None] | None = None
    states: list[np.ndarray] | None = None


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

    @classmethod
    def open(cls, uri: str) -> LatentStore:
        """Open a finished store. Raises StoreError where there is none or it is not finished."""
        return cls(uri, finished_manifest(uri))

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

    def verify(self) -> list[str]:
        """Read every byte again and compare; the problems in words (`fae inspect --verify`)."""
        return verify_store(self.uri)

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
        text: TextStore | None = None,
    ) -> Iterator[LatentBatch]:
        """Batches for ever: worker `rank`'s equal slice of each global batch from `start_step` on.

        `places` in the global batch may be given instead of `rank` and `world_size`. The order is a
        permutation of the whole store each epoch, the same however a batch is sliced; `start_step`
        may lie anywhere in an epoch. With `cache`, a local folder, shards from S3 are copied there
        when first needed. With `captions` batches have them, and with `text` their states from that
        store; of an image's several, (seed, epoch, row) draw one. Raises ValueError for a batch
        that does not divide, StoreError for an empty store, for a column that is not stored, and
        for a `text` of other images.
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
        words = None
        if text is not None:
            text.check_latents(self.uri, self.manifest)
            words = StateRows(text, rows.files, seed, cache)

        def batches() -> Iterator[LatentBatch]:
            ahead: deque[tuple[np.ndarray, np.ndarray]] = deque()
            for step in itertools.count(start_step):
                while len(ahead) <= ANNOUNCED_ROWS // len(own):
                    ahead.append(order.batch(step + len(ahead), batch_size, own))
                    rows.announce(ahead[-1][0])
                    if words:
                        words.announce(*ahead[-1])
                items, epochs = ahead.popleft()
                latents, labels = rows.take(items)
                texts = rows.captions(items, epochs, seed) if captions else None
                states = words.take(items, epochs) if words else None
                yield LatentBatch(step, latents, labels, items, epochs, texts, states)

        return batches()


def _equal_slice(batch_size: int, rank: int, world_size: int) -> range:
    if batch_size % world_size:
        raise ValueError(f"A batch of {batch_size} does not divide among {world_size} workers.")
    size = batch_size // world_size
    return range(rank * size, (rank + 1) * size)


class _Rows:
    """Random access to rows: each is one range of its shard's file, or of its cached copy."""

    def __init__(self, store: LatentStore, columns: Sequence[str], cache: str | None) -> None:
        self.shape = store.latent_shape
        self.row_bytes = 2 * int(np.prod(self.shape))
        self.files = ShardFiles(store.uri, store.manifest, cache)
        self.offsets = {
            name: np.array([entry["offsets"][name] for entry in self.files.entries], np.int64)
            for name in columns
        }
        # All of them: labels are compressed in one page, and asking again would decode it again.
        self._labels = lru_cache(None)(self._read_labels)
        self._captions = lru_cache(OPEN_SHARDS)(self._read_captions)

    def announce(self, items: np.ndarray) -> None:
        """Ask the local disk for the rows `items`, so that it reads many at once meanwhile."""
        if self.files.remote:
            return
        shards, rows = self.files.places(items)
        for of_column in self.offsets.values():
            offsets = of_column[shards] + rows * self.row_bytes
            for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
                self.files.announce(shard, self.row_bytes, offset)

    def take(self, items: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Latents and labels of the rows `items`, in their order."""
        shards, rows = self.files.places(items)
        numbers = shards.tolist()
        latents = {}
        for name, of_column in self.offsets.items():
            values = np.empty((len(items), *self.shape), np.float16)
            offsets = (of_column[shards] + rows * self.row_bytes).tolist()
            rows_of_bytes = values.view(np.uint8).reshape(-1).data
            targets = [
                rows_of_bytes[start : start + self.row_bytes]
                for start in range(0, values.nbytes, self.row_bytes)
            ]
            self.files.each(self.files.read_into, numbers, targets, offsets)
            latents[name] = values
        self.files.each(self._labels, sorted(set(numbers)))
        labels = [
            self._labels(shard)[row] for shard, row in zip(numbers, rows.tolist(), strict=True)
        ]
        return latents, np.array(labels, np.int64)

    def captions(self, items: np.ndarray, epochs: np.ndarray, seed: int) -> list[str | None]:
        """A caption of each of the rows `items`, in their order."""
        shards, rows = self.files.places(items)
        numbers = shards.tolist()
        self.files.each(self._captions, sorted(set(numbers)))
        chosen: list[str | None] = []
        for item, epoch, shard, row in zip(
            items.tolist(), epochs.tolist(), numbers, rows.tolist(), strict=True
        ):
            several = self._captions(shard)[row]
            number = caption_number(seed, epoch, item, len(several))
            chosen.append(several[number] if several else None)
        return chosen

    def _read_labels(self, index: int) -> np.ndarray:
        column = self.files.columns(index, ["label"])["label"]
        labels: np.ndarray = column.fill_null(NO_LABEL).to_numpy()
        # A hundred million labels of a thousand classes are 0.2 GB so, and 0.8 GB as they were.
        smallest = (t for t in (np.int16, np.int32, np.int64) if _all_fit(labels, t))
        return labels.astype(next(smallest))

    def _read_captions(self, index: int) -> list[tuple[str, ...]]:
        """All captions of each row of shard `index`."""
        return captions_of(self.files.columns(index, ["caption", "captions"]))


def _all_fit(values: np.ndarray, dtype: type[np.signedinteger]) -> bool:
    limits = np.iinfo(dtype)
    return not len(values) or bool(values.min() >= limits.min and values.max() <= limits.max)
