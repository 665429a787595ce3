"""The order in which training reads items: a seeded permutation per epoch, addressed by position.

Position p of the endless stream is item `permutation(epoch)[p mod n]` of epoch p // n, so any
worker can compute its part of any step without having seen the steps before: resuming and changing
the number of workers cost nothing.
"""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """The items 0..num_items-1 in a new order each epoch, the same for every worker and run."""

    def __init__(self, num_items: int, seed: int) -> None:
        if num_items < 1:
            raise ValueError("An order of no items: the data set is empty.")
        self.num_items = num_items
        self.seed = seed
        self._kept: dict[int, np.ndarray] = {}

    def permutation(self, epoch: int) -> np.ndarray:
        """The items of `epoch` in order, unsigned [num_items]; PCG64 of (seed, epoch)."""
        if epoch not in self._kept:
            # A batch can straddle two epochs, never three of those that are asked for next.
            for old in sorted(self._kept)[:-1]:
                del self._kept[old]
            generator = np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            )
            # `generator.permutation` in half the memory: shuffling draws the same for any width.
            width = np.uint32 if self.num_items <= 2**32 else np.uint64
            items = np.arange(self.num_items, dtype=width)
            generator.shuffle(items)
            self._kept[epoch] = items
        return self._kept[epoch]

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Items int64 at `positions` (int64, from 0) of the stream."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.num_items)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = self.permutation(int(epoch))[places[chosen]]
        return items

    def batch(
        self, step: int, batch_size: int, rank: int, world_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(items, epochs) int64 of worker `rank`'s equal slice of global batch `step`."""
        if batch_size % world_size:
            raise ValueError(f"A batch of {batch_size} does not divide among {world_size} workers.")
        size = batch_size // world_size
        positions = step * batch_size + rank * size + np.arange(size, dtype=np.int64)
        return self.index(positions), positions // self.num_items
