"""Hosts that are not like the others, or that come late: a job started anyway ends in words or
with the bytes of any other.

The hosts of tests/s3_host.py: one worker, and beside it another one of each test.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.hosts import SCRATCH, STARTED, Host, why_not
from tests.s3_host import Cluster, cluster_on_hosts
from tests.tiny import noisy_jpegs, save_autoencoder, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
NUM_IMAGES = 320
PATIENCE = 600.0
ONE_A_HOST = ["precompute.num_actors=2", "precompute.cpus_per_actor=1.5"]
"""Actors of which a host of two CPUs has room for one, and for a task that decodes."""


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("hosts")
    return save_autoencoder(folder / "autoencoder.safetensors").read_bytes()


@pytest.fixture(scope="module")
def cluster(autoencoder: bytes) -> Iterator[Cluster]:
    with cluster_on_hosts(num_workers=1) as cluster:
        cluster.put_images(noisy_jpegs(NUM_IMAGES), autoencoder)
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, str]:
    """ETags of the shards of a store that one host has written."""
    return ended(cluster, cluster.precompute("undisturbed"), "undisturbed")


def ended(cluster: Cluster, job: subprocess.Popen[str], output: str) -> dict[str, str]:
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, printed
    return cluster.shards(output, NUM_IMAGES)


@contextlib.contextmanager
def joined(cluster: Cluster, host: Host) -> Iterator[Host]:
    """`host` in the cluster, which it leaves again."""
    host.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    host.start_ray(cluster.head)
    wait_for(lambda: STARTED in host.path("/tmp/ray.log").read_text(), PATIENCE)
    yield host
    host.warn_ray().wait(60)


def until_writes(cluster: Cluster, job: subprocess.Popen[str], host: Host, output: str) -> None:
    wait_for(lambda: host.address in cluster.writers(output) or job.poll() is not None, PATIENCE)
    assert job.poll() is None, job.communicate()[0]


def test_a_pool_grows_onto_a_host_that_joins_late(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    job = cluster.precompute("late", *ONE_A_HOST)
    until_writes(cluster, job, cluster.workers[0], "late")
    started = time.monotonic()
    with joined(cluster, cluster.add("late")) as late:
        until_writes(cluster, job, late, "late")
        print(f"late: a shard of it {time.monotonic() - started:.0f} s after it began to start")
        assert ended(cluster, job, "late") == undisturbed
        written = cluster.writers("late")
    print(f"late: {written.count(late.address)} of {len(written)} shards on the late host")
    assert len(set(written)) == 2


def test_a_host_that_is_taken_away_with_notice(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    leaving = cluster.add("leaving")
    leaving.start_ray(cluster.head)
    wait_for(lambda: STARTED in leaving.path("/tmp/ray.log").read_text(), PATIENCE)
    job = cluster.precompute("notice", *ONE_A_HOST)
    until_writes(cluster, job, leaving, "notice")
    started, before = time.monotonic(), cluster.writers("notice").count(leaving.address)
    leaving.warn_ray().wait(120)
    after = cluster.writers("notice").count(leaving.address) - before
    print(
        f"notice: the node ended after {time.monotonic() - started:.0f} s, in which it wrote "
        f"{after} more shards"
    )
    assert ended(cluster, job, "notice") == undisturbed
    twice = len(cluster.writers("notice")) - len(undisturbed)
    print(
        f"notice: ended {time.monotonic() - started:.0f} s after it, {twice} shards written twice"
    )


def test_a_host_with_other_versions_is_refused_before_the_first_task(cluster: Cluster) -> None:
    other = cluster.add("other-versions")
    timm = other.path(f"{SCRATCH}/wrong/timm-0.0.1.dist-info")
    timm.mkdir(parents=True)
    (timm / "METADATA").write_text("Name: timm\nVersion: 0.0.1\n")
    other.environment["PYTHONPATH"] = f"{SCRATCH}/wrong:{other.environment['PYTHONPATH']}"
    with joined(cluster, other):
        printed, _ = (job := cluster.precompute("versions")).communicate(timeout=PATIENCE)
    line = f"fae: node {other.address} has timm 0.0.1; this process has python "
    assert job.returncode == 2 and line in printed, printed
    assert not cluster.etags("versions")
