"""Links between hosts fail while precompute runs: afterwards the store is what it would have been.

The hosts of tests/s3_host.py; the driver runs on the head, an actor with its tasks on each of the
others. A host whose link is down lives on, writes when it is back, and may have been given up.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.hosts import Host, why_not
from tests.s3_host import Cluster, cluster_on_hosts
from tests.tiny import noisy_jpegs, save_autoencoder, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
NUM_IMAGES, NUM_SHARDS = 320, 40
PATIENCE = 600.0
GIVEN_UP = 80.0
"""Seconds without an answer, after which Ray takes a node for dead: five checks of 10 s, 3 s
apart."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    autoencoder = save_autoencoder(tmp_path_factory.mktemp("hosts") / "autoencoder.safetensors")
    with cluster_on_hosts() as cluster:
        cluster.put_images(noisy_jpegs(NUM_IMAGES), autoencoder.read_bytes())
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, str]:
    """ETags of the shards of a store that nothing disturbed."""
    started = time.monotonic()
    shards = ended(cluster, cluster.precompute("undisturbed"), "undisturbed")
    print(f"undisturbed: {time.monotonic() - started:.0f} s")
    command = ["python", "-m", "fae", "inspect", "s3://bucket/undisturbed", "--verify"]
    assert cluster.workers[0].run(command).returncode == 0
    return shards


def begin_on(
    cluster: Cluster, host: Host, output: str, **environment: str
) -> subprocess.Popen[str]:
    """The job, once `host` has written a shard of it."""
    job = cluster.precompute(output, **environment)
    wait_for(lambda: host.address in cluster.writers(output) or job.poll() is not None, PATIENCE)
    assert job.poll() is None, job.communicate()[0]
    return job


def ended(cluster: Cluster, job: subprocess.Popen[str], output: str) -> dict[str, str]:
    """ETags of the shards by name, after the job has ended with all of them."""
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, printed
    return cluster.shards(output, NUM_IMAGES)


def measured(cluster: Cluster, output: str, started: float) -> None:
    written = cluster.writers(output)
    print(
        f"{output}: ended {time.monotonic() - started:.0f} s after the fault began; "
        f"{len(written) - NUM_SHARDS} shards were written twice"
    )


@pytest.mark.parametrize("name", ["worker1", "head"])
def test_a_link_that_is_down_for_five_seconds(
    cluster: Cluster, undisturbed: dict[str, str], name: str
) -> None:
    output = f"five-seconds-{name}"
    job = begin_on(cluster, cluster.workers[1], output)
    started = time.monotonic()
    cluster.hosts.cut(cluster.hosts.hosts[name])
    time.sleep(5)
    cluster.hosts.mend(cluster.hosts.hosts[name])
    assert ended(cluster, job, output) == undisturbed
    measured(cluster, output, started)


def test_one_host_alone_does_not_reach_s3_for_twenty_seconds(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    job = begin_on(cluster, cluster.workers[1], "without-s3")
    started = time.monotonic()
    cluster.workers[1].lose(cluster.s3)
    time.sleep(20)
    cluster.workers[1].find(cluster.s3)
    assert ended(cluster, job, "without-s3") == undisturbed
    measured(cluster, "without-s3", started)


def test_a_host_with_a_slow_link(cluster: Cluster, undisturbed: dict[str, str]) -> None:
    job = begin_on(cluster, cluster.workers[1], "slow")
    started = time.monotonic()
    cluster.workers[1].slow("500kbit")
    try:
        assert ended(cluster, job, "slow") == undisturbed
    finally:
        cluster.workers[1].fast()
    measured(cluster, "slow", started)


def test_a_host_that_is_given_up_and_comes_back_after_a_minute(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    job = begin_on(cluster, cluster.workers[1], "given-up")
    started = time.monotonic()
    cluster.hosts.cut(cluster.workers[1])
    time.sleep(60)
    cluster.hosts.mend(cluster.workers[1])
    assert ended(cluster, job, "given-up") == undisturbed
    measured(cluster, "given-up", started)
    # What the host still had in work it may write after the end.
    time.sleep(10)
    later = cluster.etags("given-up/shards/")
    assert {key.rpartition("/")[2]: etag for key, etag in later.items()} == undisturbed


def test_a_host_that_never_comes_back(cluster: Cluster, undisturbed: dict[str, str]) -> None:
    new = cluster.add_worker("worker2")
    job = begin_on(cluster, new, "for-good")
    started = time.monotonic()
    cluster.hosts.cut(new)
    assert ended(cluster, job, "for-good") == undisturbed
    measured(cluster, "for-good", started)
    cluster.workers.remove(new)
    new.kill()


def test_a_head_that_takes_its_workers_for_dead_and_gets_them_again(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    before = [host.ray_starts() for host in cluster.workers]
    job = begin_on(cluster, cluster.workers[1], "head-down")
    started = time.monotonic()
    cluster.hosts.cut(cluster.head)
    time.sleep(GIVEN_UP)
    cluster.hosts.mend(cluster.head)
    assert ended(cluster, job, "head-down") == undisturbed
    assert all(
        host.ray_starts() > count for host, count in zip(cluster.workers, before, strict=True)
    )
    measured(cluster, "head-down", started)


def test_a_head_that_never_comes_back_and_the_job_on_a_new_cluster(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    patience = {"RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "150"}
    job = begin_on(cluster, cluster.workers[1], "head-gone", **patience)
    started = time.monotonic()
    cluster.hosts.cut(cluster.head)
    # The workers of the first cluster live on and write what they have in work.
    cluster.start_ray("another-head", ["another0", "another1"], "--include-dashboard=false")
    assert ended(cluster, cluster.precompute("head-gone"), "head-gone") == undisturbed
    measured(cluster, "head-gone", started)
    printed, _ = job.communicate(timeout=PATIENCE)
    print(f"head-gone: its driver ended {time.monotonic() - started:.0f} s after the fault began")
    assert job.returncode == 2, printed
    for words in (
        "fae: nothing was finished in the last 2 minutes; 1 node is up, without a CPU.",
        "fae: Nothing has moved for 2 minutes; 1 node is up, without a CPU. What is finished "
        "remains: when there are nodes again, run the same command.",
    ):
        assert words in printed, printed
    later = cluster.etags("head-gone/shards/")
    assert {key.rpartition("/")[2]: etag for key, etag in later.items()} == undisturbed
