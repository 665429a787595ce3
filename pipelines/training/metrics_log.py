"""The metrics of a training run by step, one JSON line each in the run's folder.

Rank 0 writes them with every checkpoint, so a resumed run neither loses nor repeats a step. The
reports of `fae run` and `fae tune` draw their curves from them. `validation.png`, the figure of
the last validation, lies beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..storage import paths

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
        self.lines = [line for line in _read_lines(self.uri) if json.loads(line)["step"] <= step]

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep `metrics`, named train/NAME or validation/NAME; `save` writes them."""
        self.lines.append(json.dumps({"step": step, **metrics}))

    def save(self) -> None:
        """Write the file whole."""
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
