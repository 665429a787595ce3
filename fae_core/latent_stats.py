"""Exact per-channel mean and variance that merge in any order to the same bits.

Values are integer multiples of 2^-24: every finite float16 is one, and a float32 is rounded to the
nearest. Sums are integers of any size. Integer addition is associative, so neither the order of the
shards nor the number of workers changes the result. The latent store's manifest and the
standardization of the backbone's features use these statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SCALE_BITS = 24
LIMIT = 2.0**19
_HALF_BITS = 22
_CHUNK = 1 << 17
"""Values that are summed at once: few enough that their float64 and int64 copies stay in a core's
cache and that no int64 sum of them overflows."""


class ChannelStats:
    """Count, mean and variance of `num_channels` channels."""

    def __init__(self, count: int, sums: list[int], squares: list[int]) -> None:
        self.count = count
        self._sums = sums
        self._squares = squares

    @classmethod
    def empty(cls, num_channels: int) -> ChannelStats:
        return cls(0, [0] * num_channels, [0] * num_channels)

    def update(self, values: np.ndarray) -> None:
        """Add values [..., C]. Raises ValueError for NaN, infinity and magnitudes from 2^19."""
        rows = np.asarray(values).reshape(-1, len(self._sums))
        step = max(1, _CHUNK // len(self._sums))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step].astype(np.float64)
            if not bool((np.abs(chunk) < LIMIT).all()):
                raise ValueError(
                    "Channel statistics need finite values with magnitudes below 2^19."
                )
            fixed = np.rint(np.ldexp(chunk, SCALE_BITS)).astype(np.int64)
            high = fixed >> _HALF_BITS
            low = fixed - (high << _HALF_BITS)
            parts = (fixed.sum(0), (high * high).sum(0), (high * low).sum(0), (low * low).sum(0))
            for c, (total, hh, hl, ll) in enumerate(zip(*(p.tolist() for p in parts), strict=True)):
                self._sums[c] += total
                self._squares[c] += (hh << 2 * _HALF_BITS) + (hl << _HALF_BITS + 1) + ll
        self.count += len(rows)

    def merge(self, other: ChannelStats) -> None:
        """Add the values of `other`. Raises ValueError for another number of channels."""
        if len(other._sums) != len(self._sums):
            raise ValueError(f"{len(other._sums)} channels do not merge into {len(self._sums)}.")
        self.count += other.count
        self._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        self._squares = [a + b for a, b in zip(self._squares, other._squares, strict=True)]

    @property
    def mean(self) -> np.ndarray:
        """Mean [C], float64; zeros when nothing was counted."""
        divisor = max(self.count, 1) << SCALE_BITS
        return np.array([total / divisor for total in self._sums], dtype=np.float64)

    @property
    def variance(self) -> np.ndarray:
        """Population variance [C], float64: (n·Σx² − (Σx)²) / n², divided once, as integers."""
        n = max(self.count, 1)
        divisor = (n * n) << 2 * SCALE_BITS
        pairs = zip(self._sums, self._squares, strict=True)
        return np.array(
            [(n * square - total * total) / divisor for total, square in pairs], dtype=np.float64
        )

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation [C], float64."""
        return np.sqrt(self.variance)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe and exact: the sums are decimal strings."""
        return {
            "count": self.count,
            "sums": [str(v) for v in self._sums],
            "squares": [str(v) for v in self._squares],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChannelStats:
        return cls(
            int(values["count"]),
            [int(v) for v in values["sums"]],
            [int(v) for v in values["squares"]],
        )
