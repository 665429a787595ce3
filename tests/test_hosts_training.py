"""A training on three hosts that share nothing but an S3 server loses a host and takes another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load
from safetensors.torch import save_file

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.training.autoencoder import train_autoencoder
from fae_core.weights import load_weights
from tests.here import leave_ray_out, train_here
from tests.hosts import GCS_PORT, ROOT, why_not
from tests.s3_host import Cluster, cluster_on_hosts
from tests.tiny import noisy_jpegs, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
STEPS = 500
TOLERANCE = 1e-3
"""Of a parameter. Only the order of sums differs, but AdamW's first steps depend on signs of
gradients near zero."""


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    return list(noisy_jpegs(48))


@pytest.fixture
def cluster(jpegs: list[bytes], request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three hosts that run tasks, or as many as the test's parameter says."""
    with cluster_on_hosts(num_workers=getattr(request, "param", 3), dashboard=True) as cluster:
        for number, jpeg in enumerate(jpegs):
            cluster.put(f"images/{number:02d}.jpg", jpeg)
        yield cluster


def values(images: str, storage: str, *more: str) -> list[str]:
    training = [
        f"steps={STEPS}", "num_workers=3", "min_workers=1", "cpus_per_worker=1.5", "batch_size=12",
        "checkpoint_every=10", "validate_every=100000", *more,
    ]  # fmt: skip
    return [
        f"{ROOT}/tests/tiny_chain.yaml", f"data.path={images}", f"storage={storage}", "run=test",
        "tracking.enabled=false", *(f"autoencoder.training.{setting}" for setting in training),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(jpegs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The parameters of the same training in this process, undisturbed and on one worker."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "images").mkdir()
    for number, jpeg in enumerate(jpegs):
        (folder / "images" / f"{number:02d}.jpg").write_bytes(jpeg)
    recipe, *rest = values(str(folder / "images"), str(folder / "runs"))
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        train_here(patch)
        train_autoencoder(load_recipe(recipe, rest))
    return load(Path(folder / "runs" / "test" / "autoencoder.safetensors").read_bytes())


class Training:
    """`fae train autoencoder` on the head, which has no CPUs for workers."""

    def __init__(self, cluster: Cluster, *more: str, weights: str = "random") -> None:
        self.cluster = cluster
        words = values("s3://bucket/images", "s3://bucket/runs", *more)
        words.append(f"backbone.weights={weights}")
        log = 'exec python -m fae train autoencoder "$@" > /tmp/scratch/log 2>&1'
        address = {"RAY_ADDRESS": f"{cluster.head.address}:{GCS_PORT}"}
        self.job = cluster.head.start(["bash", "-c", log, "train", *words], address)

    def printed(self) -> str:
        """What the driver has printed. Ray brings it the workers' lines late or never when busy."""
        log = self.cluster.head.path("/tmp/scratch/log")
        return log.read_text() if log.exists() else ""

    def count(self, text: str) -> int:
        """How often workers on the hosts that are up have said `text`."""
        logs = "/tmp/ray/session_2*/logs/worker-*.out"
        files = (file for host in self.cluster.workers for file in host.path("/").glob(logs[1:]))
        return sum(file.read_text(errors="replace").count(text) for file in files)

    def until(self, text: str, before: int = 0, seconds: float = 900.0) -> float:
        """Seconds until they have said `text` more often than `before`."""

        def said() -> bool:
            assert self.job.poll() is None, self.printed()
            time.sleep(0.5)
            return self.count(text) > before

        started = time.monotonic()
        wait_for(said, seconds)
        return time.monotonic() - started

    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        names = self.cluster.etags("runs/test/checkpoints/")
        return max((int(name[-12:-3]) for name in names), default=0)

    def after_step(self, step: int, seconds: float = 600.0) -> None:
        """Wait for a checkpoint after `step`."""

        def saved() -> bool:
            assert self.job.poll() is None, self.printed()
            time.sleep(0.5)
            return self.last_step() > step

        wait_for(saved, seconds)

    def difference(self, alone: dict[str, np.ndarray]) -> float:
        """Wait for the end; the largest difference of a parameter from those of `alone`."""
        assert self.job.wait(1200) == 0, self.printed()
        trained = load(self.cluster.get("runs/test/autoencoder.safetensors"))
        assert trained.keys() == alone.keys()
        return max(float(np.abs(trained[name] - alone[name]).max()) for name in alone)


def test_a_training_goes_on_without_a_lost_host_and_takes_one_that_joins(
    cluster: Cluster, alone: dict[str, np.ndarray]
) -> None:
    training = Training(cluster)
    training.until("on 3 of 3 workers")
    training.after_step(0)
    cluster.workers.pop().kill()
    lost = training.until("on 2 of 3 workers")
    training.after_step(training.last_step())
    before = training.count("on 3 of 3 workers")
    cluster.add_worker("another")
    joined = training.until("on 3 of 3 workers", before)
    started = time.monotonic()
    difference = training.difference(alone)
    print(
        f"elastic: on two workers {lost:.0f} s after the loss, on three {joined:.0f} s after "
        f"another host joined, ended {time.monotonic() - started:.0f} s later; "
        f"largest difference of a parameter {difference:.1e}"
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_host_that_joins_late_with_other_weights_ends_the_training(cluster: Cluster) -> None:
    state = load_weights("vit_tiny_patch16_224", "random")
    file, late = "/tmp/scratch/backbone.safetensors", cluster.add("late")
    for host in (cluster.head, *cluster.workers):
        save_file(state, host.path(file))
    save_file({name: tensor + 1e-3 for name, tensor in state.items()}, late.path(file))
    more = ("num_workers=2", "steps=20000")
    training = Training(cluster, *more, weights=file)
    training.until("on 1 of 2 workers")
    training.after_step(0)
    started = time.monotonic()
    cluster.add_worker("late", late)
    assert training.job.wait(600) == 2, training.printed()
    print(f"late: the training ended {time.monotonic() - started:.0f} s after the host joined")
    line = f"fae: node {late.address}: the run s3://bucket/runs/test began with other weights"
    assert line in training.printed() and "  backbone: " in training.printed()
    late.kill()
    last = training.last_step()
    training = Training(cluster, *more, weights=file)
    training.until("resumed at step ")
    training.after_step(last)
    training.job.kill()
