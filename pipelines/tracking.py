"""MLflow as an onlooker: parameters, metrics and figures of a run, which never stop it.

The default store is sqlite:///mlflow.db; MLFLOW_TRACKING_URI or the recipe name a server. While the tracker fails, metrics
are kept and sent later with their own times; it is asked again after a minute, two, four and so on, so that a dead server
costs training next to nothing. What is lost in the end is said.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import TrackingSection
from pipelines.secrets import redact

RUN_TAG = "fae.run"
DEFAULT_URI = "sqlite:///mlflow.db"
MAX_PARAM_LENGTH = 500
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
MAX_KEPT = 100_000
METRICS_A_CALL = 1000  # what MLflow takes in one request


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def resolve_uri(tracking: TrackingSection) -> str:
    """The tracking URI; a relative SQLite path becomes absolute, since workers run in other folders."""
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    path = uri.removeprefix("sqlite:///")
    if path != uri and not path.startswith("/"):
        return f"sqlite:///{Path(path).absolute()}"
    return uri


class Tracker:
    """Logs to one MLflow run, which the same `run` address finds again when training resumes."""

    def __init__(
        self, tracking: TrackingSection, uri: str, run: str, params: Mapping[str, Any]
    ) -> None:
        self._enabled = tracking.enabled
        self._open: Callable[[], None] | None = lambda: self._find_or_create(
            tracking.experiment, uri, run, params
        )
        self._client: Any = None
        self._run_id = ""
        self._kept: list[Any] = []
        self._lost = 0
        self._pause = 0.0
        self._next_attempt = 0.0
        self._attempt()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the finite values of `metrics` at `step`, now or when the server is there again."""
        if not self._enabled:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._kept += [
            Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        self._lost += max(0, len(self._kept) - MAX_KEPT)
        del self._kept[:-MAX_KEPT]
        self._attempt()

    def log_figure(self, png: bytes, name: str) -> None:
        """Log a PNG as the artifact figures/`name`; a figure that cannot be sent now is lost."""

        def send() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                path.write_bytes(png)
                self._client.log_artifact(self._run_id, str(path), "figures")

        if not self._attempt(send):
            self._lost += 1

    def finish(self) -> None:
        """Send what was kept and mark the run as finished; says what never arrived."""
        self._next_attempt = 0.0
        self._attempt(lambda: self._client.set_terminated(self._run_id))
        if lost := self._lost + len(self._kept):
            warnings.warn(
                f"{lost} metrics or figures of this run never reached the tracking server.",
                stacklevel=2,
            )

    def _find_or_create(
        self, experiment: str, uri: str, run: str, params: Mapping[str, Any]
    ) -> None:
        # A dead server must cost seconds, not MLflow's default of many minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        if found:
            experiment_id = found.experiment_id
        else:
            location = None
            if uri.startswith("sqlite:///"):
                location = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
            experiment_id = self._client.create_experiment(experiment, artifact_location=location)
        escaped = run.replace("'", "\\'")
        runs = self._client.search_runs(
            [experiment_id], f"tags.`{RUN_TAG}` = '{escaped}'", max_results=1
        )
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.set_tag(self._run_id, "fae.resumed", "true")
            return
        created = self._client.create_run(
            experiment_id, tags={RUN_TAG: run}, run_name=run.rstrip("/").rpartition("/")[2]
        )
        self._run_id = created.info.run_id
        for key, value in params.items():
            self._client.log_param(self._run_id, key, redact(str(value))[:MAX_PARAM_LENGTH])

    def _attempt(self, action: Callable[[], None] | None = None) -> bool:
        """Open the run if it is not, send what was kept, then `action`; whether all of it was done."""
        if not self._enabled:
            return True
        if time.monotonic() < self._next_attempt:
            return False
        try:
            if self._open:
                self._open()
                self._open = None
            while self._kept:
                self._client.log_batch(self._run_id, metrics=self._kept[:METRICS_A_CALL])
                del self._kept[:METRICS_A_CALL]
            if action:
                action()
        except Exception as error:  # whatever a tracker raises, the training goes on
            if not self._pause:
                warnings.warn(
                    f"Tracking failed, training goes on: {type(error).__name__}: {redact(str(error))[:300]}. Metrics "
                    f"are kept and sent when the server answers again. Check MLFLOW_TRACKING_URI, or set "
                    "tracking.enabled=false.",
                    stacklevel=3,
                )
            self._pause = min(max(FIRST_PAUSE, 2 * self._pause), LONGEST_PAUSE)
            self._next_attempt = time.monotonic() + self._pause
            return False
        self._pause = 0.0
        return True
