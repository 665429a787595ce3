"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere; its rates."""

from __future__ import annotations

import time
from typing import ClassVar, Self

from rich import progress as rich_progress
from rich.console import Console

LINE_SECONDS = 10.0


class Progress:
    """Done of total, images/s, time left and errors, on standard error.

    `num_written` are the shards that a store holds already, where finished ones are kept in one.
    As a context it ends with the work, however that ends: nothing is drawn on the terminal then.
    """

    running: ClassVar[Progress | None] = None
    """The work that this process shows now."""

    def __init__(
        self, num_shards: int, num_images: int, enabled: bool, num_written: int | None = None
    ) -> None:
        self.num_written = num_written
        self.num_shards, self.num_images, self.enabled = num_shards, num_images, enabled
        self.shards = self.images = self.errors = 0
        self.started = self.shown = time.monotonic()
        self.encoded: list[tuple[float, int]] = []
        console = Console(stderr=True)
        self.bar = rich_progress.Progress(
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.description}"),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self.task = self.bar.add_task("", total=num_shards)
        self.bar.start()
        Progress.running = self
        self.lines = Console(stderr=True, width=200, highlight=False) if self.bar.disable else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        Progress.running = None
        self.bar.stop()

    def add(self, rows: int, errors: int, encoded_at: float) -> None:
        """Count one finished shard of `rows` images and `errors` failed ones."""
        self.shards += 1
        self.images += rows
        self.errors += errors
        self.encoded.append((encoded_at, rows))
        self.bar.update(self.task, completed=self.shards, description=self._text())
        now = time.monotonic()
        if now - self.shown > LINE_SECONDS:
            self.shown = now
            self._print_line()

    def written(self) -> str:
        """How many shards of the store are there; empty where finished ones are not kept.

        The last ones may be written and not known of yet.
        """
        if self.num_written is None:
            return ""
        total = self.num_written + self.num_shards
        return f"At least {self.num_written + self.shards} of {total} shards are written."

    def close(self) -> dict[str, float]:
        """Show the last state; rates in images per second, over all and in the middle half."""
        self.bar.update(self.task, description=self._text())
        self.__exit__()
        self._print_line()
        rates = {"images_per_second": self.images / self._seconds()}
        if len(self.encoded) >= 8:
            ends = sorted(self.encoded)
            first, last = len(ends) // 4, 3 * len(ends) // 4
            images = sum(rows for _, rows in ends[first + 1 : last + 1])
            rates["steady_images_per_second"] = images / max(ends[last][0] - ends[first][0], 1e-9)
        return rates

    def _seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def _text(self) -> str:
        left = self._seconds() / max(self.shards, 1) * (self.num_shards - self.shards)
        return (
            f"shards {self.shards}/{self.num_shards} | {self.images} images | "
            f"{self.images / self._seconds():.1f} images/s | {duration(left)} left | "
            f"{self.errors} errors"
        )

    def _print_line(self) -> None:
        if self.enabled and self.lines is not None:
            self.lines.print(self._text(), markup=False)


def duration(seconds: float) -> str:
    """`seconds` for a glance: 45 s, 12 min, 3.2 h, 4.1 d."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
