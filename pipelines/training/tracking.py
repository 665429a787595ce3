"""MLflow tracking: parameters, metrics and figures of a run. A failing server never stops the run.

The default store is sqlite:///mlflow.db; MLFLOW_TRACKING_URI or the recipe names a server. While
requests fail, metrics are kept and sent later with their own times. The server is tried again
after a minute, two, four and so on up to an hour, so a dead one costs training next to nothing.
A warning at the end counts what was lost. Trainers, the chain and the sweeps log here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config.facts import PathValue
from ..config.sections import TrackingSection
from ..data.account import Account
from ..runtime.packages import versions
from ..runtime.places import refuse, unseen
from ..storage import redact

RUN_TAG = "fae.run"
DEFAULT_URI = "sqlite:///mlflow.db"
MAX_PARAM_LENGTH = 500
MAX_NOTE_LENGTH = 4000
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
MAX_KEPT = 100_000
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # what MLflow takes in one request

# MLflow's telemetry reports to its makers, and in MLflow 3.17 two of its threads can conflict (a
# KeyError in log_params). A user who wants it sets the variable.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def resolve_uri(tracking: TrackingSection) -> str:
    """The tracking URI, with an absolute path for SQLite: workers run in other folders."""
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    path = uri.removeprefix("sqlite:///")
    if path != uri and not path.startswith("/"):
        return f"sqlite:///{Path(path).absolute()}"
    return uri


def shared_tracking(tracking: TrackingSection) -> TrackingSection:
    """`tracking` with its resolved URI, for a job whose workers run on several nodes.

    It is off, with a warning, where nobody named a place and the default database would be a file
    of one host. Raises PlaceError where a file that is named is not the same on all nodes.
    """
    settled = tracking.model_copy(update={"uri": resolve_uri(tracking)})
    assert settled.uri is not None
    if not tracking.enabled or not settled.uri.startswith("sqlite:///"):
        return settled
    found = unseen({"tracking.uri": PathValue("output", settled.uri)})
    if found and not (tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        warnings.warn(
            f"Nothing is logged to MLflow: {DEFAULT_URI} would be a file of one host. Set "
            "MLFLOW_TRACKING_URI=http://… to log.",
            stacklevel=3,
        )
        settled.enabled = False
        return settled
    refuse(found)
    return settled


def account_note(account: Account) -> str:
    """The account of a source as MLflow's pages show it: preformatted, without passwords."""
    text = redact("\n".join(account.lines()))
    return f"```\n{text[:MAX_NOTE_LENGTH]}\n```"


@functools.cache
def source_tags() -> dict[str, str]:
    """Tags that name the code of a run: package versions, and the git commit of a checkout."""
    tags = {f"version.{name}": version for name, version in versions().items()}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root = Path(__file__).parents[1]
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return tags


class Tracker:
    """Logs to one MLflow run, which the same `run` address finds again when training resumes.

    Nothing here raises for what a server does; a tracker that is off in `tracking` does nothing.
    """

    def __init__(
        self,
        tracking: TrackingSection,
        uri: str,
        run: str,
        params: Mapping[str, Any],
        name: str | None = None,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """`name` is shown instead of the last part of the address `run`.

        `parent` is the address of the run that this one is nested in.
        """
        shown = name or run.rstrip("/").rpartition("/")[2]

        def open_run() -> None:
            self._connect(tracking.experiment, uri)
            self._find_or_create(run, shown, params, parent, tags or {})

        self._enabled = tracking.enabled
        self._open: Callable[[], None] | None = open_run
        self._client: Any = None
        self._run_id = self._experiment_id = ""
        self._kept: list[Any] = []
        self._lost = 0
        self._pause = 0.0
        self._next_attempt = 0.0
        self._attempt()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the finite values of `metrics` at `step`, now or when the server answers again."""
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
        self.log_file(png, name, "figures")

    def log_file(self, data: bytes, name: str, folder: str | None = None) -> None:
        """Log `data` as the artifact `name` in `folder`; what cannot be sent now is lost."""

        def send() -> None:
            with tempfile.TemporaryDirectory() as local:
                path = Path(local) / name
                path.write_bytes(data)
                self._client.log_artifact(self._run_id, str(path), folder)

        if not self._attempt(send):
            self._lost += 1

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags; `mlflow.note.content` is the text that the run's page shows."""

        def send() -> None:
            for key, value in tags.items():
                self._client.set_tag(self._run_id, key, value)

        self._attempt(send)

    def rename(self, name: str) -> None:
        """Show the run under another name."""
        self._attempt(lambda: self._client.update_run(self._run_id, name=name))

    def finish(self, status: str = "FINISHED") -> None:
        """Send what was kept and end the run as MLflow's `status`; warns of what never arrived."""
        self._next_attempt = 0.0
        self._attempt(lambda: self._client.set_terminated(self._run_id, status))
        if lost := self._lost + len(self._kept):
            warnings.warn(
                f"{lost} metrics or figures of this run never reached the tracking server.",
                stacklevel=2,
            )

    def _connect(self, experiment: str, uri: str) -> None:
        from mlflow.exceptions import MlflowException

        self._client = _client_of(uri)
        found = self._client.get_experiment_by_name(experiment)
        if not found:
            location = None
            if uri.startswith("sqlite:///"):
                location = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
            try:
                self._experiment_id = self._client.create_experiment(
                    experiment, artifact_location=location
                )
                return
            except MlflowException:
                # Another run may have created it meanwhile.
                found = self._client.get_experiment_by_name(experiment)
                if not found:
                    raise
        self._experiment_id = found.experiment_id

    def _find_or_create(
        self,
        run: str,
        name: str,
        params: Mapping[str, Any],
        parent: str | None,
        tags: Mapping[str, str],
    ) -> None:
        found = self._find(run)
        if found:
            self._run_id = found
            self._client.set_tag(self._run_id, "fae.resumed", "true")
            self._client.update_run(self._run_id, status="RUNNING")
            return
        made = {RUN_TAG: run, **source_tags(), **tags}
        parent_id = self._find(parent) if parent else None
        if parent_id:
            made["mlflow.parentRunId"] = parent_id
        created = self._client.create_run(self._experiment_id, tags=made, run_name=name)
        self._run_id = created.info.run_id
        from mlflow.entities import Param

        values = [
            Param(key, redact(str(value))[:MAX_PARAM_LENGTH]) for key, value in params.items()
        ]
        for start in range(0, len(values), PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=values[start : start + PARAMS_A_CALL])

    def _find(self, run: str) -> str | None:
        """The id of the run with this address."""
        found = _run_of(self._client, self._experiment_id, run)
        return str(found.info.run_id) if found else None

    def _attempt(self, action: Callable[[], None] | None = None) -> bool:
        """Open the run if it is not, send what was kept, then `action`; whether all succeeded."""
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
        except Exception as error:  # whatever a tracker raises, the training continues
            if not self._pause:
                warnings.warn(
                    f"Tracking failed, training goes on: {type(error).__name__}: "
                    f"{redact(str(error))[:300]}. Metrics are kept and sent when the server "
                    "answers again. Check MLFLOW_TRACKING_URI, or set tracking.enabled=false.",
                    stacklevel=3,
                )
            self._pause = min(max(FIRST_PAUSE, 2 * self._pause), LONGEST_PAUSE)
            self._next_attempt = time.monotonic() + self._pause
            return False
        self._pause = 0.0
        return True


def end_run(tracking: TrackingSection, run: str, status: str) -> None:
    """End the run with the address `run` as MLflow's `status`, where one is there and RUNNING.

    For what notices the end of a process that could not end its run itself. Raises nothing.
    """
    if not tracking.enabled:
        return
    with contextlib.suppress(Exception):  # what ended the process is what the user must hear of
        client = _client_of(resolve_uri(tracking))
        experiment = client.get_experiment_by_name(tracking.experiment)
        found = experiment and _run_of(client, experiment.experiment_id, run)
        if found and found.info.status == "RUNNING":
            client.set_terminated(found.info.run_id, status)


def _client_of(uri: str) -> Any:
    # A dead server must cost seconds, not MLflow's default of many minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _run_of(client: Any, experiment_id: str, run: str) -> Any:
    """The experiment's run with this address, or None."""
    escaped = run.replace("'", "\\'")
    runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{escaped}'", max_results=1)
    return runs[0] if runs else None
