"""MLflow as an onlooker: parameters, metrics and figures of a run, which never stop it.

The default store is sqlite:///mlflow.db; MLFLOW_TRACKING_URI or the recipe name a server. The first failure of the
tracker is printed once, then the tracker is silent for the rest of the run.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import TrackingSection

RUN_TAG = "fae.run"
DEFAULT_URI = "sqlite:///mlflow.db"
MAX_PARAM_LENGTH = 500


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
        self._working = tracking.enabled
        self._client: Any = None
        self._run_id = ""
        self._attempt(lambda: self._open(tracking.experiment, uri, run, params))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the finite values of `metrics` at `step`."""

        def send() -> None:
            for key, value in metrics.items():
                if math.isfinite(value):
                    self._client.log_metric(self._run_id, key, float(value), step=step)

        self._attempt(send)

    def log_figure(self, png: bytes, name: str) -> None:
        """Log a PNG as the artifact figures/`name`."""

        def send() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                path.write_bytes(png)
                self._client.log_artifact(self._run_id, str(path), "figures")

        self._attempt(send)

    def finish(self) -> None:
        """Mark the run as finished."""
        self._attempt(lambda: self._client.set_terminated(self._run_id))

    def _open(self, experiment: str, uri: str, run: str, params: Mapping[str, Any]) -> None:
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
            self._client.log_param(self._run_id, key, str(value)[:MAX_PARAM_LENGTH])

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._working:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker raises, the training goes on
            self._working = False
            warnings.warn(
                f"Tracking stopped, training goes on: {type(error).__name__}: {str(error)[:300]}. "
                "Check MLFLOW_TRACKING_URI, or set tracking.enabled=false.",
                stacklevel=2,
            )
