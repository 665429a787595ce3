"""The progress line of long work, and the rates that it measured."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line: done / total, images/s, time left, errors. Rewritten in place on a terminal, every 10 s elsewhere."""

    def __init__(self, num_shards: int, num_images: int, enabled: bool) -> None:
        self.num_shards, self.num_images, self.enabled = num_shards, num_images, enabled
        self.shards = self.images = self.errors = 0
        self.started = self.shown = time.monotonic()
        self.encoded: list[tuple[float, int]] = []

    def add(self, rows: int, errors: int, encoded_at: float) -> None:
        self.shards += 1
        self.images += rows
        self.errors += errors
        now = time.monotonic()
        self.encoded.append((encoded_at, rows))
        if sys.stderr.isatty() or now - self.shown > 10:
            self.shown = now
            self._show("\r" if sys.stderr.isatty() else "")

    def _show(self, start: str) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = seconds / max(self.shards, 1) * (self.num_shards - self.shards)
        if self.enabled:
            print(
                f"{start}shards {self.shards}/{self.num_shards} | {self.images} images | "
                f"{self.images / seconds:.1f} images/s | {duration(left)} left | {self.errors} errors ",
                end="" if start else "\n",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> dict[str, float]:
        """Show the last line; the rates in images per second, over all and in the middle half."""
        self._show("\r" if sys.stderr.isatty() else "")
        if self.enabled and sys.stderr.isatty():
            print(file=sys.stderr)
        seconds = max(time.monotonic() - self.started, 1e-9)
        rates = {"images_per_second": self.images / seconds}
        if len(self.encoded) >= 8:
            ends = sorted(self.encoded)
            first, last = len(ends) // 4, 3 * len(ends) // 4
            images = sum(rows for _, rows in ends[first + 1 : last + 1])
            rates["steady_images_per_second"] = images / max(ends[last][0] - ends[first][0], 1e-9)
        return rates


def duration(seconds: float) -> str:
    """`seconds` for a glance: 45 s, 12 min, 3.2 h, 4.1 d."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
