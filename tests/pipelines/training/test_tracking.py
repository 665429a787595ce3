"""A real MLflow server that is absent, goes away and is killed.

Training continues, and metrics arrive or their loss is reported. The proxy before the server lets
it go and come back without another start, which takes MLflow long.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import TrackingSection
from fae.pipelines.data.account import Account
from fae.pipelines.training import tracking
from fae.pipelines.training.launch import Worker, launch
from fae.pipelines.training.loop import run_job
from fae.pipelines.training.tracking import Tracker, end_run
from tests.fault_proxy import FaultProxy


class Server:
    """`mlflow server` on loopback over a SQLite file, which survives it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server",
            "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", f"{self.folder}/artifacts",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=self.folder, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.integration
def test_metrics_of_a_server_that_was_away_arrive_later_or_their_loss_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server(tmp_path)
    with FaultProxy(server.url) as proxy:
        section = TrackingSection(uri=proxy.url.replace("://", "://user:marker-password@"))
        try:
            with pytest.warns(UserWarning, match="Tracking failed, training goes on") as warned:
                tracker = Tracker(section, str(section.uri), "runs/first", {"seed": 0})
                proxy.stop()
                tracker.log_metrics({"loss": 3.0}, 1)
            assert "marker-password" not in str(warned[0].message)
            server.start()
            proxy.start()
            tracker.log_metrics({"loss": 2.0, "norm": float("nan")}, 2)
            proxy.stop()  # dies in the middle of training: connections end, new ones are refused
            with pytest.warns(UserWarning, match="training goes on"):
                tracker.log_metrics({"loss": 1.0}, 3)
            proxy.start()
            tracker.log_metrics({"loss": 0.5}, 4)
            tracker.finish()

            from mlflow.tracking import MlflowClient

            client = MlflowClient(server.url)
            experiment = client.get_experiment_by_name("fae")
            (run,) = client.search_runs([experiment.experiment_id])
            history = client.get_metric_history(run.info.run_id, "loss")
            assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
            assert run.info.status == "FINISHED" and run.data.params == {"seed": "0"}
            second = Tracker(section, proxy.url, "runs/second", {})
            server.kill()
            with pytest.warns(UserWarning) as warned:
                second.log_metrics({"loss": 1.0, "norm": 1.0}, 1)
                second.finish()
            assert "2 metrics or figures of this run never reached" in str(warned[-1].message)
        finally:
            server.kill()


def test_a_runs_page_shows_the_account_of_its_images(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    account = Account("photos", "folder", num_files=9, num_images=7, num_labels=6, num_classes=2)
    account.class_names, account.labels_from = ["cat", "dog"], "class folders"
    account.skip("hidden", "photos/.DS_Store", 2)
    recipe, uri = load_recipe("photos-dinov2s"), f"sqlite:///{tmp_path}/mlflow.db"
    training, run = recipe.autoencoder.training, f"{tmp_path}/r"
    first, second = (
        Worker("autoencoder", recipe, training, run, uri, torch.device("cpu"), first, account)
        for first in (True, False)
    )
    assert second.tracker() is None
    first.tracker().finish()
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("fae").experiment_id])
    counts = {n: v for n, v in found.data.params.items() if n.startswith("source.")}
    assert counts == {
        "source.files": "9", "source.skipped": "2", "source.images": "7", "source.labels": "6",
        "source.classes": "2", "source.captions": "0", "source.losses": "0",
    }  # fmt: skip
    note = found.data.tags["mlflow.note.content"]
    assert "9 listed = 7 read + 2 skipped" in note and "2 classes (cat … dog)" in note
    path = client.download_artifacts(found.info.run_id, "source.json", str(tmp_path))
    assert Account.from_dict(json.loads(Path(path).read_text())) == account


def test_a_dead_server_is_asked_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    now = [0.0]
    monkeypatch.setattr("fae.pipelines.training.tracking.time.monotonic", lambda: now[0])
    with pytest.warns(UserWarning, match="training goes on"):
        tracker = Tracker(TrackingSection(), "http://127.0.0.1:9", "runs/r", {})
    asked = []
    for minute in range(1, 130):
        now[0] = minute * 60.0 + 1
        before = tracker._next_attempt
        tracker.log_metrics({"loss": 1.0}, minute)
        if tracker._next_attempt != before:
            asked.append(minute)
    assert asked == [1, 3, 7, 15, 31, 63, 123]


@pytest.mark.parametrize("broken_part", ["_train", "run_folder.finish"])
def test_a_training_that_fails_is_failed_in_mlflow(tmp_path, monkeypatch, broken_part):
    from mlflow.tracking import MlflowClient

    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("fae.pipelines.training.loop._train", lambda *_: (None, {}))
    monkeypatch.setattr(f"fae.pipelines.training.loop.{broken_part}", broken)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = load_recipe("photos-dinov2s", [f"tracking.uri={uri}"])
    cpu = torch.device("cpu")
    worker = Worker("generator", recipe, recipe.generator.training, "runs/first", uri, cpu, True)
    with pytest.raises(ValueError, match="a bug"):
        run_job(worker, None, None, None, dict)
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fae").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (WorkerGroupError("", {0: ActorDiedError()}), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
    ids=["died", "stopped"],
)
def test_a_run_whose_first_worker_died_is_ended_in_mlflow(tmp_path, monkeypatch, error, status):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    values = [f"tracking.uri={uri}", f"storage={tmp_path}", "run=first"]
    recipe = load_recipe("photos-dinov2s", [*values, "generator.training.max_failures=0"])

    class Trainer:
        def __init__(self, *_: object, train_loop_config: dict, **__: object) -> None:
            self.run, self.uri = f"{tmp_path}/first", train_loop_config["tracking_uri"]

        def fit(self) -> None:
            Tracker(recipe.tracking, self.uri, self.run, {})
            raise error

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr("fae.pipelines.training.launch.start_ray", lambda: None)
    with pytest.raises(type(error)):
        launch(run_job, recipe, recipe.generator.training)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fae").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == status


def test_a_run_that_has_ended_is_not_ended_again(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    section = TrackingSection(uri=uri)
    end_run(section, "runs/r", "FAILED")  # there is none
    Tracker(section, uri, "runs/r", {}).finish()
    end_run(section, "runs/r", "FAILED")
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fae").experiment_id])
    assert run.info.status == "FINISHED"
