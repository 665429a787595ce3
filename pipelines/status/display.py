"""Shows a status in the terminal: a bar, rates, and the losses as small plots of blocks."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runtime.progress import duration
from .account import BEGUN, FINISHED, RUNNING, SILENT, Status

PLOT_WIDTH, PLOT_HEIGHT = 60, 4
LINE_WIDTH = 24
BAR_WIDTH = 40
COLOURS = {FINISHED: "green", RUNNING: "cyan", SILENT: "yellow", BEGUN: "yellow"}
MEANINGS = {
    SILENT: "it may have stopped; the same command resumes it",
    BEGUN: "it has written no result yet",
}
_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_status(status: Status) -> None:
    """Print the status of a job, and a line for each of its parts."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    _print_head(console, status)
    _print_counts(console, status)
    _print_losses(console, status)
    if status.parts:
        _print_parts(console, status.parts)
    if status.errors:
        console.print(f"[red]errors: {status.errors:,}[/red]")
    for note in status.notes:
        console.print(f"note: {note}", style="dim", markup=False)


def _print_head(console: Console, status: Status) -> None:
    colour = COLOURS.get(status.state, "default")
    said = [f"[bold]{escape(status.kind)}[/bold]  {escape(status.uri)}"]
    said.append(f"[{colour}]{status.state}[/{colour}]")
    if status.silent_seconds is not None:
        said.append(f"last write {duration(status.silent_seconds)} ago")
    console.print("  ".join(said), soft_wrap=True)
    if meaning := MEANINGS.get(status.state):
        console.print(meaning, style="dim")


def _print_counts(console: Console, status: Status) -> None:
    if not status.unit:
        return
    filled = min(BAR_WIDTH, BAR_WIDTH * status.done // status.total) if status.total else 0
    total = f"{status.total:,}" if status.total is not None else "?"
    bar = "█" * filled + "░" * (BAR_WIDTH - filled)
    said = [f"{bar}  {status.done:,} of {total} {status.unit}"]
    if status.rate is not None:
        said.append(rate_text(status.rate, status.unit))
    if status.seconds_left is not None:
        # What does not run needs the time only once it runs again.
        running = "left" if status.state == RUNNING else "left once it runs"
        said.append(f"{duration(status.seconds_left)} {running}")
    console.print(" · ".join(said), markup=False)


def _print_losses(console: Console, status: Status) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    main = "train/loss" if "train/loss" in status.losses else next(iter(status.losses), None)
    for name, series in status.losses.items():
        values = [value for _, value in series]
        if name == main and len(values) > 1:
            console.print(f"{name}, steps {series[0][0]:,} to {series[-1][0]:,}", markup=False)
            for line in plot(values):
                console.print(line, markup=False, style="cyan")
        else:
            table.add_row(name, f"{values[-1]:.4g}", sparkline(values, LINE_WIDTH))
    if table.row_count:
        console.print(table)


def _print_parts(console: Console, parts: Sequence[Status]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("job", "state", "done", "left", "errors", "folder"):
        table.add_column(title, no_wrap=title != "folder", overflow="fold")
    for part in parts:
        total = f"{part.total:,}" if part.total is not None else "?"
        colour = COLOURS.get(part.state, "default")
        table.add_row(
            escape(part.kind),
            f"[{colour}]{part.state}[/{colour}]",
            f"{part.done:,} of {total} {part.unit}" if part.unit else "",
            duration(part.seconds_left) if part.seconds_left is not None else "",
            f"{part.errors:,}" if part.errors else "",
            escape(part.uri.rstrip("/").rpartition("/")[2]),
        )
    console.print(table)


def rate_text(rate: float, unit: str) -> str:
    """`rate` in units per second, minute or hour, so that the number is at least 1 if it can be."""
    for seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * seconds >= 1 or name == "h":
            break
    return f"{rate * seconds:.3g} {unit}/{name}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values in one line of blocks, from the lowest to the highest of them."""
    (line,) = _rows(values, width, 1)
    return line


def plot(values: Sequence[float]) -> list[str]:
    """The values as PLOT_HEIGHT lines of blocks, the first and last with the scale's ends."""
    lines = _rows(values, PLOT_WIDTH, PLOT_HEIGHT)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        lines[0] += f"  {max(finite):.4g} highest"
        lines[-1] += f"  {values[-1]:.4g} last, {min(finite):.4g} lowest"
    return lines


def _rows(values: Sequence[float], width: int, height: int) -> list[str]:
    """Columns of blocks; many values are averaged by column, one that is not finite is a `!`."""
    columns = min(width, len(values))
    means: list[float] = []
    for column in range(columns):
        part = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        means.append(math.fsum(part) / len(part) if all(map(math.isfinite, part)) else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    rows = []
    for row in range(height - 1, -1, -1):
        line = ""
        for mean in means:
            if not math.isfinite(mean):
                line += "!"
                continue
            # The lowest value is one eighth of a block, so that it is still to be seen.
            share = (mean - low) / (high - low) if high > low else 0.0
            eighths = 1 + round(share * (8 * height - 1))
            line += _BLOCKS[max(0, min(8, eighths - 8 * row))]
        rows.append(line)
    return rows
