"""A cluster of several raylets loses a node, gains one, and loses its head: precompute ends with
the same bytes.

The raylets are real processes on this machine (ray.cluster_utils) and are really killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.latents.manifest import read_manifest
from fae.pipelines.latents.precompute_job import precompute
from fae.pipelines.latents.verify import verify_store
from tests.tiny import ROOT, TINY, noisy_jpegs, save_autoencoder, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]
NUM_IMAGES = 400


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "images").mkdir()
    for index, jpeg in enumerate(noisy_jpegs(NUM_IMAGES)):
        (folder / "images" / f"{index:03d}.jpg").write_bytes(jpeg)
    autoencoder = save_autoencoder(folder / "autoencoder.safetensors")
    return [*TINY, f"data.path={folder}/images", f"autoencoder.checkpoint={autoencoder}"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    # Seconds after which a driver or raylet gives up on a head that is gone; Ray's own are a minute
    # and more.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def exact(output: Path) -> list[str]:
    assert verify_store(str(output)) == []
    manifest = read_manifest(str(output))
    assert manifest and (manifest["planned"], manifest["stored"]) == (NUM_IMAGES, NUM_IMAGES)
    return [entry["etag"] for entry in manifest["shards"]]


def test_a_lost_node_and_one_that_joins_cost_nothing(
    cluster: Any, values: list[str], tmp_path: Path
) -> None:
    import ray

    node = cluster.add_node(num_cpus=2, wait=False)
    ray.init(address=cluster.address, log_to_driver=False)
    output = tmp_path / "store"
    errors: list[Exception] = []

    def run() -> None:
        try:
            precompute(load_recipe("photos-dinov2s", [*values, f"output={output}"]), False)
        except Exception as error:
            errors.append(error)

    job = threading.Thread(target=run, daemon=True)
    job.start()
    wait_for(lambda: len(list(output.glob("shards/*.parquet"))) >= 3 or errors)
    cluster.remove_node(node, allow_graceful=False)
    started = time.monotonic()
    done = len(list(output.glob("shards/*.parquet")))
    assert done < NUM_IMAGES // 8, "the node went too late to matter"
    # The cluster has no CPU now; all that is left runs on the node that joins.
    cluster.add_node(num_cpus=2, wait=False)
    job.join(timeout=180)
    assert not job.is_alive() and not errors, errors
    print(f"node lost: {time.monotonic() - started:.1f} s from the kill to the end")
    assert len(exact(output)) == NUM_IMAGES // 8


def test_a_lost_head_ends_the_job_and_submitting_it_again_goes_on(
    cluster: Any, values: list[str], tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    output = tmp_path / "store"
    command = [
        sys.executable, "-m", "fae", "precompute", "photos-dinov2s", *values, f"output={output}",
    ]  # fmt: skip
    cluster.add_node(num_cpus=2, wait=False)
    first = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: len(list(output.glob("shards/*.parquet"))) >= 3 or first.poll() is not None)
    started = time.monotonic()
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    printed, _ = first.communicate(timeout=120)
    assert first.returncode != 0, printed
    print(f"head lost: the driver ended after {time.monotonic() - started:.1f} s")
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("shards/*.parquet")}
    assert 3 <= len(finished) < NUM_IMAGES // 8 and not (output / "manifest.json").exists()
    another = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": another.address},
            capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        print(f"head lost: submitted again, {time.monotonic() - started:.1f} s to the end")
    finally:
        another.shutdown()
    exact(output)
    now = {path.name: path.stat().st_mtime_ns for path in output.glob("shards/*.parquet")}
    assert finished.items() <= now.items()
