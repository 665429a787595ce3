"""Two hosts that share only what is declared: what a job does that was written for one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import GCS_PORT, SCRATCH, Hosts, why_not
from tests.tiny import TINY, noisy_jpegs, wait_for

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

OTHER_TIME = """
import time
real = time.time
time.time = lambda: real() + 3600
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


@pytest.mark.faults
def test_doctor_names_the_host_with_another_clock_version_or_file_and_without_disk(
    tmp_path: Path,
) -> None:
    with Hosts() as hosts:
        head, other = hosts.add("head"), hosts.add("other", disk_mb=300)
        wrong = other.path(f"{SCRATCH}/wrong")
        (wrong / "timm-0.0.1.dist-info").mkdir(parents=True)
        (wrong / "timm-0.0.1.dist-info" / "METADATA").write_text("Name: timm\nVersion: 0.0.1\n")
        (wrong / "sitecustomize.py").write_text(OTHER_TIME)
        other.environment["PYTHONPATH"] = f"{SCRATCH}/wrong:{other.environment['PYTHONPATH']}"
        for host in (head, other):
            host.path(f"{SCRATCH}/weights.pth").write_bytes(host.name.encode())
        head.start_ray(head, "--include-dashboard=false")
        other.start_ray(head)
        wait_for(lambda: "Ray runtime started" in other.path("/tmp/ray.log").read_text())
        disk = os.statvfs(other.path(SCRATCH))
        free = disk.f_bavail * disk.f_frsize
        other.path(f"{SCRATCH}/full").write_bytes(bytes(free - 8_000_000))
        recipe = ["photos-dinov2s", "tracking.enabled=false"]
        places = [f"backbone.weights={SCRATCH}/weights.pth", f"output={SCRATCH}/latents"]
        command = ["python", "-m", "fae", "doctor", *recipe, *places]
        ran = head.run(command, {"RAY_ADDRESS": f"{head.address}:{GCS_PORT}"})
    assert ran.returncode == 1, ran.stdout
    name = other.address
    for words in (
        rf"problem  disk         {name} has \d+ MB of 315 MB free",
        rf"problem  clock        {name} is 3\d\d\d s ahead of this process",
        rf"problem  versions     {name} has timm 0.0.1; this process has",
        rf"problem  places       backbone.weights=\S+ is another file on {name}\.",
        rf"problem  places       output=\S+ is not there on {name}\.",
    ):
        assert re.search(words, ran.stdout), f"{words}\n{ran.stdout}"
