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
from safetensors.torch import save_file

from fae_core.weights import load_weights
from tests.hosts import SCRATCH, Host, why_not
from tests.s3_host import Cluster, cluster_on_hosts
from tests.tiny import SHARD_SIZE, noisy_jpegs, save_autoencoder, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
NUM_IMAGES = 320
PATIENCE = 600.0
ONE_A_HOST = ["precompute.num_actors=2", "precompute.cpus_per_actor=1.5"]
"""Actors of which a host of two CPUs has room for one, and for a task that decodes."""
LARGE_SIZE = 40
LARGE = [f"precompute.shard_size={LARGE_SIZE}"]
"""Crops of 123 kB, which are in the object store. Ray sends less than 100 KiB within its calls."""


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


@pytest.fixture(scope="module")
def undisturbed_large(cluster: Cluster) -> dict[str, str]:
    """The same of shards of LARGE_SIZE images."""
    return ended(cluster, cluster.precompute("large", *LARGE), "large", LARGE_SIZE)


def ended(
    cluster: Cluster, job: subprocess.Popen[str], output: str, shard_size: int = SHARD_SIZE
) -> dict[str, str]:
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, printed
    return cluster.shards(output, NUM_IMAGES, shard_size)


@contextlib.contextmanager
def joined(cluster: Cluster, host: Host, num_cpus: int = 2) -> Iterator[Host]:
    """`host` in the cluster, which it leaves again."""
    host.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    host.start_ray(cluster.head, num_cpus=num_cpus)
    wait_for(host.ray_starts, PATIENCE)
    yield host
    host.warn_ray().wait(60)


def with_another_timm(host: Host) -> None:
    """Let the host's processes find timm 0.0.1 by its metadata."""
    timm = host.path(f"{SCRATCH}/wrong/timm-0.0.1.dist-info")
    timm.mkdir(parents=True)
    (timm / "METADATA").write_text("Name: timm\nVersion: 0.0.1\n")
    host.environment["PYTHONPATH"] = f"{SCRATCH}/wrong:{host.environment['PYTHONPATH']}"


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
    wait_for(leaving.ray_starts, PATIENCE)
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


def test_a_host_whose_disk_is_full_in_the_middle_of_a_job(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    with joined(cluster, cluster.add("full", disk_mb=300)) as full:
        job = cluster.precompute("full", *ONE_A_HOST)
        until_writes(cluster, job, full, "full")
        before = cluster.writers("full").count(full.address)
        full.fill("/tmp")
        assert ended(cluster, job, "full") == undisturbed
    written = cluster.writers("full")
    print(
        f"full: {written.count(full.address) - before} more shards of the full host, "
        f"{len(written) - len(undisturbed)} shards written twice"
    )


@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_a_host_whose_dev_shm_is_too_small(
    cluster: Cluster, undisturbed_large: dict[str, str], when: str
) -> None:
    output = f"shm-{when.replace(' ', '-')}"
    size = 64 if when == "from the start" else 500
    with joined(cluster, cluster.add(output, shm_mb=size)) as small:
        moved = "using /tmp/ray instead of /dev/shm" in small.path("/tmp/ray.log").read_text()
        assert moved == (when == "from the start")
        job = cluster.precompute(output, *ONE_A_HOST, *LARGE)
        if not moved:
            wait_for(lambda: cluster.writers(output) or job.poll() is not None, PATIENCE)
            small.fill("/dev/shm")
        assert ended(cluster, job, output, LARGE_SIZE) == undisturbed_large
    written = cluster.writers(output)
    print(f"{output}: {written.count(small.address)} of {len(written)} shards on that host")


@pytest.mark.parametrize("what", ["weights", "versions"])
def test_a_host_that_joins_late_and_is_unlike_the_others_ends_the_job_and_writes_nothing(
    cluster: Cluster, undisturbed: dict[str, str], what: str
) -> None:
    # The same weights as those of `undisturbed`, but on each host's own disk.
    state = load_weights("vit_tiny_patch16_224", "random")
    file, output = f"{SCRATCH}/backbone.safetensors", f"late-{what}"
    for host in (cluster.head, cluster.workers[0]):
        save_file(state, host.path(file))
    weights = f"backbone.weights={file}"
    # Only the late host has room for an actor.
    job = cluster.precompute(output, "precompute.cpus_per_actor=2.5", weights)
    planned = f"{output}/plan.parquet"  # after the hosts were compared
    wait_for(lambda: cluster.has(planned) or job.poll() is not None, PATIENCE)
    late = cluster.add(output)
    save_file(state, late.path(file))
    if what == "weights":
        save_file({name: tensor + 1e-3 for name, tensor in state.items()}, late.path(file))
        line = f"fae: node {late.address}: s3://bucket/autoencoder.safetensors was trained with "
    else:
        with_another_timm(late)
        line = f"fae: node {late.address}: it has timm 0.0.1; the job was started with python "
    with joined(cluster, late, num_cpus=4):
        printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 2 and line in printed, printed
    assert not cluster.writers(output)
    assert ended(cluster, cluster.precompute(output, weights), output) == undisturbed


def test_a_host_with_other_versions_is_refused_before_the_first_task(cluster: Cluster) -> None:
    other = cluster.add("other-versions")
    with_another_timm(other)
    with joined(cluster, other):
        printed, _ = (job := cluster.precompute("versions")).communicate(timeout=PATIENCE)
    line = f"fae: node {other.address} has timm 0.0.1; this process has python "
    assert job.returncode == 2 and line in printed, printed
    assert not cluster.etags("versions")
