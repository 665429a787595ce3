"""Ctrl-C in a training: the process's own handler stays, and the training's processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.training.launch import fit
from fae.stopping import stoppable
from tests.tiny import ROOT


class Controller:
    """What `ray.remote(…)(TrainController)` makes: each method's `remote` returns its name."""

    @classmethod
    def remote(cls, **_: Any) -> Controller:
        return cls()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda: name)


@pytest.fixture
def controllers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Ray Train's own driver without a cluster; a call runs what stands under its name."""
    import ray.data
    import ray.train.torch  # noqa: F401  (their modules use what is replaced here)

    calls: dict[str, Any] = {"run": lambda: None, "abort": lambda: None, "killed": []}
    calls["get_result"] = lambda: SimpleNamespace(error=None)
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr("ray.remote", lambda **_: lambda _: Controller)
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.get", lambda name: calls[name]())
    monkeypatch.setattr("ray.kill", calls["killed"].append)
    monkeypatch.setattr("ray.get_runtime_context", lambda: here)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    before = signal.getsignal(signal.SIGINT)
    yield calls
    signal.signal(signal.SIGINT, before)


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def trains(folder: Path) -> None:
    fit(lambda _: None, {}, TrainingSection(), f"{folder}/run")


def test_ctrl_c_in_a_training_ends_it_with_the_line_and_status_130(
    controllers: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    controllers["run"] = interrupted
    with pytest.raises(typer.Exit) as end, stoppable():
        trains(tmp_path)
    assert end.value.exit_code == 130 and "fae: stopped by SIGINT." in capfd.readouterr().err
    assert [type(killed) for killed in controllers["killed"]] == [Controller]


def test_ctrl_c_after_a_training_is_not_the_trainings(
    controllers: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(typer.Exit) as end, stoppable():
        trains(tmp_path)
        interrupted()
    assert end.value.exit_code == 130 and not controllers["killed"]


@pytest.mark.integration
@pytest.mark.parametrize("command", [["train", "autoencoder"], ["run"]])
def test_a_cluster_is_free_after_ctrl_c_in_the_driver(
    command: list[str], photographs: Path, tmp_path: Path
) -> None:
    """Of one training, and of a chain that trains two networks side by side."""
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=4)
    try:
        steps = [f"{one}.training.steps=100000" for one in ("autoencoder", "pixel_decoder")]
        places = (f"data.path={photographs}", f"storage={tmp_path}", "run=alone")
        driver = subprocess.Popen(
            [sys.executable, "-m", "fae", *command, "tests/tiny_chain.yaml", *places, *steps,
             "tracking.enabled=false"],
            cwd=ROOT, env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        trainings = 2 if command == ["run"] else 1
        while len(list(tmp_path.glob("*/checkpoints"))) < trainings:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=60)
        assert driver.returncode == 130 and "fae: stopped by SIGINT." in errors, errors
        # Ray Train's own actor, which cleans up behind a controller, may tell of its end.
        own = [line for line in errors.splitlines() if "PlacementGroupCleaner" not in line]
        assert not any("Traceback" in line for line in own), errors
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 4.0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()
