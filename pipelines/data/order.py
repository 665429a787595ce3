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
        self, step: int, batch_size: int, places: range | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(items, epochs) int64 at `places` of global batch `step`, or of all of it."""
        places = range(batch_size) if places is None else places
        positions = step * batch_size + np.arange(places.start, places.stop, dtype=np.int64)
        return self.index(positions), positions // self.num_items
