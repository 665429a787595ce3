"""The metrics of a training run by step, one JSON line each in the run's folder.

Rank 0 writes them with every checkpoint, so a resumed run neither loses nor repeats a step, and
between checkpoints for those who watch (`fae status`). The reports of `fae run` and `fae tune` draw
their curves from them. `validation.png`, the figure of the last validation, lies beside them.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping

from ..storage import paths

PUBLISH_SECONDS = 15.0
"""The least time between two writes that are for watching alone."""

Series = dict[str, list[tuple[int, float]]]
"""(step, value) of each metric, in the order of steps."""


def read_metrics_log(run_uri: str) -> Series:
    """The series of the run, finished or not; empty where it has saved nothing yet."""
    series: Series = {}
    for line in _read_lines(metrics_log_uri(run_uri)):
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            series.setdefault(name, []).append((step, value))
    return series


class MetricsLog:
    """The lines of a run in training; begins with the saved ones up to the step it resumes at."""

    def __init__(self, run_uri: str, step: int) -> None:
        self.uri = metrics_log_uri(run_uri)
        self.run_uri = run_uri
        self.published = -PUBLISH_SECONDS
        self.publishing: threading.Thread | None = None
        self.lines = [line for line in _read_lines(self.uri) if json.loads(line)["step"] <= step]

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep `metrics`, named train/NAME or validation/NAME; `save` writes them."""
        self.lines.append(json.dumps({"step": step, **metrics}))

    def publish(self) -> None:
        """Write the lines in the background, unless that was done PUBLISH_SECONDS ago or less.

        Training does not wait for it, and `save` raises what fails here again.
        """
        busy = self.publishing is not None and self.publishing.is_alive()
        if not busy and time.monotonic() - self.published >= PUBLISH_SECONDS:
            self.published = time.monotonic()
            self.publishing = threading.Thread(target=self._write_quietly, daemon=True)
            self.publishing.start()

    def save(self) -> None:
        """Write the file whole."""
        if self.publishing is not None:
            self.publishing.join()
        self._write()

    def _write_quietly(self) -> None:
        with contextlib.suppress(paths.StorageError):
            self._write()

    def _write(self) -> None:
        paths.write_bytes(self.uri, ("\n".join(self.lines) + "\n").encode())

    def save_figure(self, png: bytes) -> None:
        """Replace validation.png."""
        paths.write_bytes(figure_uri(self.run_uri), png)


def metrics_log_uri(run_uri: str) -> str:
    """Address of the run's metrics."""
    return paths.join(run_uri, "history.jsonl")


def figure_uri(run_uri: str) -> str:
    """Address of the figure of the run's last validation."""
    return paths.join(run_uri, "validation.png")


def _read_lines(uri: str) -> list[str]:
    return paths.read_bytes(uri).decode().splitlines() if paths.exists(uri) else []
