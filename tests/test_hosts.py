"""Two hosts that share only what is declared: what a job does that was written for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import GCS_PORT, SCRATCH, Hosts, why_not
from tests.tiny import TINY, noisy_jpegs

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
NAME_THE_HOSTS_AND_RUN = """
import platform, time, ray
from fae.pipelines.runtime import lanes, session
from fae.cli import main
session.start_ray()
while len(ray.nodes()) < 2:
    time.sleep(0.2)
print(sorted(answer.value for answer in lanes.ask_every_node(platform.node)))
main()
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts([tmp_path]) as hosts:
        head, worker = hosts.add("head"), hosts.add("worker")
        head.start_ray(head, "--include-dashboard=false")
        worker.start_ray(head)
        yield hosts


def test_tasks_run_on_both_hosts_and_a_path_of_one_of_them_is_refused_before_the_job(
    hosts: Hosts, tmp_path: Path
) -> None:
    head, worker = hosts.hosts["head"], hosts.hosts["worker"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(next(noisy_jpegs(1)))
    head.path(f"{SCRATCH}/autoencoder.safetensors").write_bytes(b"autoencoder")
    for host in (head, worker):
        host.path(f"{SCRATCH}/weights.pth").write_bytes(host.name.encode())
    places = [
        f"data.path={tmp_path}/images",
        f"autoencoder.checkpoint={SCRATCH}/autoencoder.safetensors",
        f"backbone.weights={SCRATCH}/weights.pth",
        f"output={SCRATCH}/latents",
    ]
    command = ["python", "-c", NAME_THE_HOSTS_AND_RUN, "precompute", "photos-dinov2s"]
    ran = head.run([*command, *TINY, *places], {"RAY_ADDRESS": f"{head.address}:{GCS_PORT}"})
    assert "['head', 'worker']" in ran.stdout, ran.stdout
    said = [line for line in ran.stdout.splitlines() if line.startswith("fae: ")]
    assert ran.returncode == 2 and said == [
        f"fae: output={SCRATCH}/latents is not there on node {worker.address}; "
        f"backbone.weights={SCRATCH}/weights.pth is another file on node {worker.address}; "
        f"autoencoder.checkpoint={SCRATCH}/autoencoder.safetensors is not there on node "
        f"{worker.address}. A cluster of several nodes needs s3://… or a folder that all of them "
        "share."
    ], ran.stdout
    assert not head.path(f"{SCRATCH}/latents").exists()
