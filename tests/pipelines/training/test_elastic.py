"""A training on real raylets goes on with fewer workers when a node is lost, and takes another that
joins: it ends with the parameters of a run on one worker."""

from __future__ import annotations

import os
import re
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, jpeg in enumerate(noisy_jpegs(48)):
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(jpeg)
    return tmp_path


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


class Training:
    """`fae train autoencoder` on the cluster, in the run `elastic`."""

    def __init__(self, address: str, folder: Path, *more: str) -> None:
        self.checkpoints = folder / "runs" / "elastic" / "checkpoints"
        self.log = folder / "log"
        with self.log.open("w") as file:
            command = [sys.executable, "-c", DRIVER, "train", "autoencoder"]
            self.job = subprocess.Popen(
                [*command, *values(folder, "elastic", "min_workers=1", *more)], cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": address}, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def until(self, text: str, times: int = 1) -> float:
        """Seconds until the training has said `text` so many times."""

        def said() -> bool:
            found = self.log.read_text().count(text) >= times
            assert found or self.job.poll() is None, self.log.read_text()
            return found

        started = time.monotonic()
        wait_for(said, 240)
        return time.monotonic() - started

    def saved(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step_*.pt"))

    def end(self) -> None:
        assert self.job.wait(600) == 0, self.log.read_text()
        print(self.log.read_text())


def assert_as_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters are those of a run in this process, on one worker."""
    leave_ray_out(monkeypatch)
    train_here(monkeypatch)
    recipe, *rest = values(folder, "alone")
    train_autoencoder(load_recipe(str(ROOT / recipe), rest))
    one, many = (
        load_file(folder / "runs" / run / "autoencoder.safetensors") for run in ("alone", "elastic")
    )
    print("largest difference:", max(np.abs(one[name] - many[name]).max() for name in one))
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_training_goes_on_without_a_lost_node_and_takes_one_that_joins(
    cluster: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    parallel: str,
) -> None:
    # Each has room for one worker and one task that decodes.
    nodes = [cluster.add_node(num_cpus=2, wait=False) for _ in range(3)]
    training = Training(cluster.address, folder, f"parallel={parallel}")
    request.addfinalizer(training.job.kill)
    training.until("on 3 of 3 workers")
    wait_for(training.saved, 120)
    cluster.remove_node(nodes[0], allow_graceful=False)
    lost = training.until("on 2 of 3 workers")
    before = training.saved()[-1]
    wait_for(lambda: training.saved()[-1] > before, 120)
    cluster.add_node(num_cpus=2, wait=False)
    joined = training.until("on 3 of 3 workers", 2)
    training.end()
    print(f"{parallel}: on two workers {lost:.0f} s after the loss, on three {joined:.0f} s later")
    assert_as_alone(folder, monkeypatch)


def test_a_node_that_gets_sigterm_loses_and_repeats_no_step(
    cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    cluster.add_node(num_cpus=2, wait=False)
    # As on a host of its own: after SIGTERM it tells the cluster and waits, 30 s at most.
    command = ["ray", "start", "--block", "--disable-usage-stats", "--num-cpus=2"]
    node = subprocess.Popen([*command, f"--address={cluster.address}"], stdout=subprocess.DEVNULL)
    request.addfinalizer(node.kill)
    training = Training(
        cluster.address, folder, "num_workers=2", "checkpoint_every=1000", "max_failures=0"
    )
    request.addfinalizer(training.job.kill)
    training.until("step 2/")
    assert "on 2 of 2 workers" in training.log.read_text()
    node.terminate()
    started = time.monotonic()
    wait_for(training.saved, 30)
    saved = time.monotonic() - started
    node.wait(60)
    ended = time.monotonic() - started
    (step,) = (int(path.stem.removeprefix("step_")) for path in training.saved())
    training.until(f"resumed at step {step} ")
    moved = time.monotonic() - started
    training.end()
    print(
        f"SIGTERM: step {step} saved after {saved:.0f} s, the node ended after {ended:.0f} s, "
        f"on one worker after {moved:.0f} s"
    )
    # Two raylets on one machine both bring a line.
    said = set(re.findall(rf"pid=(\d+).* step (\d+)/{STEPS}", training.log.read_text()))
    assert sorted(int(number) for _, number in said) == list(range(2, STEPS + 1, 2))
    assert_as_alone(folder, monkeypatch)
