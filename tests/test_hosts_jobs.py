"""The whole path on three hosts that share nothing but an S3 server on a fourth: images to scores.

Commands are submitted from the fourth host, and Ray's token authentication is on everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.hosts import ROOT, why_not
from tests.s3_host import Cluster, cluster_on_hosts
from tests.tiny import noisy_jpegs

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
NUM_IMAGES = 64
ON_TWO_HOSTS = [
    f"{network}.training.{setting}"
    for network in ("autoencoder", "pixel_decoder", "generator")
    # Two workers of 1.5 CPUs do not fit on one host.
    for setting in ("num_workers=2", "cpus_per_worker=1.5")
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_on_hosts(dashboard=True) as cluster:
        for number, jpeg in enumerate(noisy_jpegs(NUM_IMAGES)):
            cluster.put(f"images/{number:02d}.jpg", jpeg)
        yield cluster


def submit(cluster: Cluster, *words: str) -> str:
    """What the job printed."""
    command = ["python", "-m", "fae", "submit", *words, "--address", cluster.job_server]
    done = cluster.s3.run([*command, "--working-dir", str(ROOT)], timeout=1500)
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout


def test_from_images_to_scores_with_trainings_across_hosts(cluster: Cluster) -> None:
    said = submit(
        cluster, "run", "tests/tiny_chain.yaml", "data.path=s3://bucket/images",
        "storage=s3://bucket/runs", "chain.finetune=false", *ON_TWO_HOSTS,
        "precompute.shard_size=16", "precompute.num_actors=2", "sample.num_actors=2",
    )  # fmt: skip
    assert "Nothing is logged to MLflow" in said
    written = cluster.etags("runs/")
    stages = {key.split("/")[1]: key for key in written if key.endswith("/stage.json")}
    names = sorted(name.rpartition("-")[0] for name in stages)
    wanted = ["autoencoder", "evaluation", "generator", "latents", "pixel-decoder", "samples"]
    assert names == sorted([*wanted, "report"])
    metrics = {
        name.rpartition("-")[0]: json.loads(cluster.get(key))["metrics"]
        for name, key in stages.items()
    }
    assert metrics["latents"]["stored"] == NUM_IMAGES and metrics["samples"]["stored"] == 32
    assert metrics["evaluation"]["frechet_backbone"] > 0
    (latents,) = (name for name in stages if name.startswith("latents-"))
    command = ["python", "-m", "fae", "inspect", f"s3://bucket/runs/{latents}", "--verify"]
    inspected = cluster.workers[1].run(command)
    assert inspected.returncode == 0, inspected.stdout


def test_two_trials_of_a_sweep(cluster: Cluster) -> None:
    said = submit(
        cluster, "tune", "tests/tiny_chain.yaml", "data.path=s3://bucket/images",
        "storage=s3://bucket/runs", "tune.name=sizes",
        "tune.space.autoencoder.latent_dim.grid=[4,6]",
    )  # fmt: skip
    assert "2 of 2 trials finished" in said
    results = [key for key in cluster.etags("runs/tune/") if key.endswith("/result.json")]
    assert len(results) == 2
