"""A finished store of token states, and the join with the latents of the same images by row.

`fae precompute-text` writes it from the plan of a latent store, so a shard here holds the captions
of the images of the same shard there. The reader of latents (reader.py) reads both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from fae_core.draws import sample_generator

from ..storage import StoreError, differences, paths
from .manifest import finished_manifest
from .plan import TEXT_FORMAT, open_plan
from .shard_files import OPEN_SHARDS, ShardFiles
from .shards import WORD_COLUMNS, read_errors
from .token_states import STATES, TOKENS, empty_states, starts_of

PRECISION = "precision"
"""The part of the fingerprint that is no mark of the encoder."""


class TextStore:
    """A finished store of token states.

    It has `manifest`, `state_dim` D, and `empty`, the states float16 [L, D] of the empty caption.
    """

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.state_dim: int = manifest["state_dim"]
        self.empty = empty_states(manifest)

    @classmethod
    def open(cls, uri: str) -> TextStore:
        """Open a finished store. Raises StoreError where there is none or it is not finished."""
        return cls(uri, finished_manifest(uri, TEXT_FORMAT))

    @property
    def marks(self) -> dict[str, str]:
        """The fingerprints of encoder, tokenizer and settings that made the states."""
        return {name: part for name, part in self.manifest["parts"].items() if name != PRECISION}

    @property
    def precision(self) -> str:
        """The dtype of autocast in which the encoder ran."""
        return str(self.manifest["parts"][PRECISION])

    def first_states(
        self, uri: str, manifest: dict[str, Any], rows: Sequence[int]
    ) -> list[np.ndarray]:
        """States float16 [L, D] of the first caption of rows of the latent store at `uri`."""
        states = StateRows(self, ShardFiles(uri, manifest, None), 0, None)
        return states.take(np.array(rows, np.int64))

    def check_encoder(self, marks: Mapping[str, str]) -> None:
        """Raises StoreError where the states are not those of the encoder with these `marks`."""
        differing = differences(self.marks, marks, show=str)
        if differing:
            raise StoreError(
                f"The states in {self.uri} are another encoder's than the recipe's section text: "
                f"{'; '.join(differing)}."
            )

    def check_latents(self, uri: str, manifest: Mapping[str, Any]) -> None:
        """Raises StoreError where the states are not those of the latent store's captions."""
        wrong = f"The states in {self.uri} do not belong to the latents in {uri}:"
        advice = f"Make them from it: fae precompute-text RECIPE latents={uri} output=STORE."
        sizes = self.manifest["shard_size"], manifest["shard_size"]
        if sizes[0] != sizes[1]:
            raise StoreError(f"{wrong} shards of {sizes[0]} images, and of {sizes[1]}. {advice}")
        if self.manifest["source"] != manifest["source"]:
            # Images of another address or label may still have the same captions.
            both = zip_longest(open_plan(self.uri).captions(), open_plan(uri).captions())
            for there, here in both:
                if there != here:
                    raise StoreError(f"{wrong} {_said(there)} there, {_said(here)} here. {advice}")
        if self.manifest["errors"]:
            lost = {error["key"] for error in read_errors(self.uri)}
            lost -= {error["key"] for error in read_errors(uri)}
            if lost:
                raise StoreError(
                    f"{wrong} {len(lost)} images have latents and no states, for example "
                    f"{min(lost)!r}. {paths.join(self.uri, 'errors')} says why."
                )


def _said(row: tuple[str, tuple[str, ...]] | None) -> str:
    return "no further image" if row is None else f"{row[0]!r} with the captions {list(row[1])}"


def caption_number(seed: int, epoch: int, row: int, num_captions: int) -> int:
    """Which of a row's captions a training sees in `epoch`."""
    if num_captions < 2:
        return 0
    generator = sample_generator(seed, "caption", epoch, row)
    return int(torch.randint(num_captions, (), generator=generator))


class StateRows:
    """Random access to the states that belong to the rows of `latents`."""

    def __init__(self, store: TextStore, latents: ShardFiles, seed: int, cache: str | None) -> None:
        self.seed, self.width = seed, store.state_dim
        self.latents = latents
        self.files = ShardFiles(store.uri, store.manifest, cache)
        self._words = lru_cache(OPEN_SHARDS)(self._read_words)

    def announce(self, items: np.ndarray, epochs: np.ndarray) -> None:
        """Ask the local disk for the states of rows of latents that will be read soon."""
        if not self.files.remote:
            for shard, offset, count in zip(*self._ranges(items, epochs), strict=True):
                self.files.announce(shard, 2 * self.width * count, offset)

    def take(self, items: np.ndarray, epochs: np.ndarray | None = None) -> list[np.ndarray]:
        """States float16 [L, D] of a caption of each of the rows `items` of the latents.

        It is the one that (seed, epoch, row) draw, and the first without `epochs`.
        """
        shards, offsets, counts = self._ranges(items, epochs)
        found = [np.empty((count, self.width), np.float16) for count in counts]
        targets = [states.view(np.uint8).reshape(-1).data for states in found]
        self.files.each(self.files.read_into, shards, targets, offsets)
        return found

    def _ranges(
        self, items: np.ndarray, epochs: np.ndarray | None
    ) -> tuple[list[int], list[int], list[int]]:
        """Shard, first byte and number of tokens of the caption that each row has."""
        shards, rows = self.latents.places(items)
        self.files.each(self._words, sorted(set(shards.tolist())))
        drawn = [None] * len(items) if epochs is None else epochs.tolist()
        offsets, counts = [], []
        for item, epoch, shard, row in zip(
            items.tolist(), drawn, shards.tolist(), rows.tolist(), strict=True
        ):
            captions, tokens, row_of = self._words(shard)
            place = row if row_of is None else int(row_of[row])
            first, end = int(captions[place]), int(captions[place + 1])
            number = 0
            if epoch is not None:
                number = caption_number(self.seed, epoch, item, end - first)
            caption = first + number
            start = int(tokens[caption])
            counts.append(int(tokens[caption + 1]) - start)
            offsets.append(self.files.entries[shard]["offsets"][STATES] + 2 * self.width * start)
        return shards.tolist(), offsets, counts

    def _read_words(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Where the captions and tokens of shard `index` begin, and the row here of each of the
        latents' rows; None where both have all images.
        """
        captions, tokens = starts_of(self.files.columns(index, [TOKENS])[TOKENS])
        sides = (self.files, self.latents)
        if not any(side.entries[index]["errors"] for side in sides):
            return captions, tokens, None
        here, there = (
            side.columns(index, ["key"])["key"].cast(WORD_COLUMNS["key"]).to_pylist()
            for side in sides
        )
        row_of = {key: row for row, key in enumerate(here)}
        return captions, tokens, np.array([row_of[key] for key in there], np.int64)
