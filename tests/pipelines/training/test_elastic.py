"""A training on real raylets goes on with fewer workers when a node is lost, and takes another that
joins: it ends with the parameters of a run on one worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.training.autoencoder import train_autoencoder
from tests.here import leave_ray_out, train_here
from tests.tiny import ROOT, noisy_jpegs, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]
STEPS = 120
DRIVER = """
import sys
from fae.pipelines.training import launch
launch.RESIZE_SECONDS = 10.0
from fae.cli import main
main()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


def values(folder: Path, run: str, *more: str) -> list[str]:
    training = [
        f"steps={STEPS}", "num_workers=3", "cpus_per_worker=1.5", "batch_size=12",
        "checkpoint_every=5", "validate_every=100000", *more,
    ]  # fmt: skip
    return [
        "tests/tiny_chain.yaml", f"data.path={folder}/images", f"storage={folder}/runs",
        "tracking.enabled=false", f"run={run}",
        *(f"autoencoder.training.{setting}" for setting in training),
    ]  # fmt: skip


def test_a_training_goes_on_without_a_lost_node_and_takes_one_that_joins(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "images").mkdir()
    for number, jpeg in enumerate(noisy_jpegs(48)):
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(jpeg)
    # Each has room for one worker and one task that decodes.
    nodes = [cluster.add_node(num_cpus=2, wait=False) for _ in range(3)]
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-c", DRIVER, "train", "autoencoder"]
        job = subprocess.Popen(
            [*command, *values(tmp_path, "elastic", "min_workers=1")], cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": cluster.address}, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    request.addfinalizer(job.kill)

    def until(text: str, times: int = 1, seconds: float = 240.0) -> float:
        def seen() -> bool:
            assert job.poll() is None or log.read_text().count(text) >= times, log.read_text()
            return log.read_text().count(text) >= times

        started = time.monotonic()
        wait_for(seen, seconds)
        return time.monotonic() - started

    def saved() -> list[Path]:
        return sorted((tmp_path / "runs" / "elastic" / "checkpoints").glob("step_*.pt"))

    until("on 3 of 3 workers")
    wait_for(saved, 120)
    cluster.remove_node(nodes[0], allow_graceful=False)
    lost = until("on 2 of 3 workers")
    before = saved()[-1]
    wait_for(lambda: saved()[-1] > before, 120)
    cluster.add_node(num_cpus=2, wait=False)
    joined = until("on 3 of 3 workers", 2)
    assert job.wait(600) == 0, log.read_text()
    print(log.read_text())
    print(f"elastic: on two workers {lost:.0f} s after the loss, on three {joined:.0f} s later")

    leave_ray_out(monkeypatch)
    train_here(monkeypatch)
    train_autoencoder(load_recipe(values(tmp_path, "alone")[0], values(tmp_path, "alone")[1:]))
    one, many = (
        load_file(tmp_path / "runs" / run / "autoencoder.safetensors")
        for run in ("alone", "elastic")
    )
    print("largest difference:", max(np.abs(one[name] - many[name]).max() for name in one))
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
