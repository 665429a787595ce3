"""What a training run says: lines for people, metrics for MLflow and for the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

from .metrics_log import MetricsLog
from .tracking import Tracker


def say(text: str) -> None:
    """Print a line of a run's progress at once."""
    print(text, flush=True)


class RunLog:
    """Where the metrics of a run go; rank 0 alone has one."""

    def __init__(self, tracker: Tracker, metrics_log: MetricsLog) -> None:
        self.tracker = tracker
        self.metrics_log = metrics_log

    def add(self, kind: str, title: str, metrics: Mapping[str, float], step: int) -> None:
        """Print the metrics after `title` and log them at `step` as KIND/NAME."""
        if metrics:
            say(title + "".join(f"  {name} {value:.4g}" for name, value in metrics.items()))
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        self.tracker.log_metrics(named, step)
        self.metrics_log.add(named, step)

    def add_figure(self, png: bytes, step: int) -> None:
        """Replace the run's figure, and keep each in MLflow under its step."""
        self.metrics_log.save_figure(png)
        self.tracker.log_figure(png, f"step_{step:09d}.png")
