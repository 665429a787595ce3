"""What the demo prints: one bar for the stage that runs, with the time left, and its result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from rich import progress as rich_progress
from rich.console import Console

from ..runtime.progress import duration

Advance = Callable[[float], None]
"""Takes the share of the stage that is done, from 0 to 1."""


class Screen:
    """Stages one after the other, whose seconds on two idle cores are known beforehand."""

    def __init__(self, expected: Mapping[str, float]) -> None:
        self.expected = dict(expected)
        self.seconds: dict[str, float] = {}
        """Of the stages that have ended, by title."""
        self.console = Console(highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """Runs a stage of `expected`; it calls what it is given with the share that is done."""
        number = f"{list(self.expected).index(title) + 1}/{len(self.expected)}"
        self.console.print(f"{number}  {title}   {self._left(title, 0.0)}", markup=False)
        started = time.monotonic()
        columns = (
            rich_progress.TextColumn("    "),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.description}"),
        )
        bar = rich_progress.Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        task = bar.add_task("", total=1.0)

        def advance(share: float) -> None:
            bar.update(task, completed=share, description=self._left(title, share))

        with bar:
            advance(0.0)
            yield advance
        self.seconds[title] = time.monotonic() - started

    def say(self, result: str) -> None:
        """One line below the title."""
        self.console.print(f"     {result}", markup=False)

    def _left(self, title: str, share: float) -> str:
        """The time until the end, if this machine stays as slow as it was in the ended stages."""
        past = sum(self.expected[ended] for ended in self.seconds)
        slowness = sum(self.seconds.values()) / past if past else 1.0
        coming = [s for other, s in self.expected.items() if other not in {*self.seconds, title}]
        left = slowness * (sum(coming) + (1.0 - share) * self.expected[title])
        return f"about {duration(left)} left"
