"""Precompute while S3 falters, workers die, the disk fills and others write the same store: nothing
is lost or repeated.

Each fault is injected for real, in the middle of a job on real Ray processes; docs/reliability.md
lists them. The S3 server is moto behind a proxy that misbehaves. `seconds` of each test are printed
with `pytest -rP`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest

from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.latents.manifest import missing_shards
from fae.pipelines.latents.plan import open_plan
from fae.pipelines.latents.precompute_job import precompute
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.storage import paths
from fae.pipelines.storage.claims import StoreMismatch
from tests.fault_proxy import FaultProxy
from tests.tiny import ROOT, SHARD_SIZE, TINY, noisy_jpegs, save_autoencoder, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]
NUM_IMAGES = 96


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    """In front of moto, with this module's AWS variables pointing at it."""
    with pytest.MonkeyPatch.context() as environment, FaultProxy(s3_server) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "not-for-messages",
            "AWS_DEFAULT_REGION": "us-east-1",
            "FAE_S3_PATIENCE": "60",
        }.items():
            environment.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def images(proxy: FaultProxy) -> str:
    """An s3:// prefix with small noisy JPEGs."""
    boto3.client("s3", endpoint_url=proxy.url).create_bucket(Bucket="faulty")
    for index, jpeg in enumerate(noisy_jpegs(NUM_IMAGES)):
        paths.write_bytes(f"s3://faulty/images/{index:03d}.jpg", jpeg)
    return "s3://faulty/images"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def ray_session(proxy: FaultProxy) -> Iterator[None]:
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


def recipe_for(images: str, autoencoder: Path, output: str, *more: str) -> Recipe:
    values = [*TINY, f"data.path={images}", f"autoencoder.checkpoint={autoencoder}"]
    return load_recipe("photos-dinov2s", [*values, f"output={output}", *more])


@pytest.fixture(scope="module")
def etags(images: str, autoencoder: Path, ray_session: None) -> list[str]:
    """The shards' hashes of a job to which nothing happened: what every other job must end with."""
    recipe = recipe_for(images, autoencoder, "s3://faulty/undisturbed")
    return exact(precompute(recipe, show_progress=False), str(recipe.output))


def exact(manifest: dict, output: str) -> list[str]:
    assert (manifest["planned"], manifest["stored"], manifest["errors"]) == (
        NUM_IMAGES,
        NUM_IMAGES,
        0,
    )
    assert verify_store(output) == []
    return [entry["etag"] for entry in manifest["shards"]]


def shards(output: str) -> int:
    return len(list(paths.list_files(paths.join(output, "shards"))))


class Job(threading.Thread):
    """`precompute` in a thread of this driver."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(daemon=True)
        self.recipe = recipe
        self.manifest: dict = {}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.manifest = precompute(self.recipe, show_progress=False)
        except Exception as error:
            self.error = error

    def result(self) -> dict:
        self.join(timeout=120)
        if self.error:
            raise self.error
        assert not self.is_alive()
        return self.manifest


# S3


def is_shard_upload(method: str, path: str) -> bool:
    return method == "PUT" and "/shards/" in path


def frozen(proxy: FaultProxy) -> None:
    proxy.freeze()
    time.sleep(4)
    proxy.thaw()


def restarted(proxy: FaultProxy) -> None:
    proxy.stop()
    time.sleep(3)
    proxy.start()


def busy_and_slow(proxy: FaultProxy) -> None:
    proxy.latency = 0.2
    proxy.inject("503", 40)


def cut_uploads(proxy: FaultProxy) -> None:
    proxy.inject("cut upload", 3, is_shard_upload)
    proxy.inject("answer lost", 2, is_shard_upload)


def broken_answers(proxy: FaultProxy) -> None:
    proxy.inject("cut answer", 10, lambda method, path: method == "GET" and "/images/" in path)


@pytest.mark.parametrize("fault", [frozen, restarted, busy_and_slow, cut_uploads, broken_answers])
def test_an_s3_that_falters_costs_time_and_nothing_else(
    fault, proxy: FaultProxy, images: str, autoencoder: Path, etags: list[str]
) -> None:
    output = f"s3://faulty/{fault.__name__}"
    proxy.latency = 0.02  # so that the job still has most of its way to go
    before = proxy.injected.copy()
    if fault is broken_answers:  # images are read long before the first shard is written
        fault(proxy)
    job = Job(recipe_for(images, autoencoder, output))
    wait_for(lambda: shards(output) >= 1)
    started = time.monotonic()
    if fault is not broken_answers:
        fault(proxy)
    done = shards(output)
    manifest = job.result()
    print(f"{fault.__name__}: {time.monotonic() - started:.1f} s from the fault to the end")
    proxy.latency = 0.0
    assert done < NUM_IMAGES // SHARD_SIZE, "the fault came too late to matter"
    assert fault in (frozen, restarted) or sum((proxy.injected - before).values()) >= 3
    assert exact(manifest, output) == etags


# Workers


def decoders() -> list[psutil.Process]:
    """Of this test's own Ray, which is a child of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and "ray::Map(decode_shard)" in process.cmdline()[0]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_decode_task_that_is_killed_as_by_the_oom_killer_runs_again(
    proxy: FaultProxy, images: str, autoencoder: Path, etags: list[str]
) -> None:
    output = "s3://faulty/oom"
    proxy.latency = 0.5  # a task is in the middle of its reads for long enough to be found
    known = {process.pid for process in decoders()}
    job = Job(recipe_for(images, autoencoder, output))
    wait_for(lambda: {process.pid for process in decoders()} - known)
    killed = 0
    while killed < 2 and job.is_alive():
        for process in decoders():
            if process.pid not in known:
                process.send_signal(signal.SIGKILL)  # what the OOM killer sends
                known.add(process.pid)
                killed += 1
        time.sleep(0.05)
    proxy.latency = 0.0
    assert killed >= 2
    started = time.monotonic()
    assert exact(job.result(), output) == etags
    print(f"oom: {time.monotonic() - started:.1f} s from the kill to the end")


def driver(images: str, autoencoder: Path, output: str) -> subprocess.Popen[str]:
    """`precompute` in a process of its own, on this module's Ray."""
    import ray

    command = [
        sys.executable, "-m", "fae", "precompute", "photos-dinov2s", *TINY, f"data.path={images}",
        f"autoencoder.checkpoint={autoencoder}", f"output={output}",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": "token",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The disk


def test_a_full_disk_ends_the_job_with_its_name_and_a_larger_one_goes_on(
    images: str, autoencoder: Path, etags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=44k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        recipe = recipe_for(images, autoencoder, str(folder / "store"))
        _, errors = (job := driver(images, autoencoder, str(recipe.output))).communicate(
            timeout=180
        )
        assert job.returncode == 2, errors
        assert re.search(r"Cannot write .*store.*no space left there", errors), errors
        assert not (folder / "store" / "manifest.json").exists()
        assert list(folder.rglob("*.tmp")) == []
        finished = {p.name: p.stat().st_mtime_ns for p in folder.glob("store/shards/*")}
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
        started = time.monotonic()
        assert exact(precompute(recipe, show_progress=False), str(folder / "store")) == etags
        print(
            f"disk full: {time.monotonic() - started:.1f} s to finish with {len(finished)} shards "
            "there"
        )
        now = {p.name: p.stat().st_mtime_ns for p in folder.glob("store/shards/*")}
        assert 0 < len(finished) < len(now) and finished.items() <= now.items()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# Others


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_stop_says_how_far_it_is_and_the_same_command_goes_on(
    images: str, autoencoder: Path, etags: list[str], number: signal.Signals
) -> None:
    output = f"s3://faulty/{number.name.lower()}"
    job = driver(images, autoencoder, output)
    wait_for(lambda: shards(output) >= 3 or job.poll() is not None, 300)
    started = time.monotonic()
    job.send_signal(number)
    _, errors = job.communicate(timeout=120)
    print(f"{number.name}: the driver ended after {time.monotonic() - started:.1f} s")
    assert job.returncode == 128 + number, errors
    line = (
        rf"fae: stopped by {number.name}\. At least (\d+) of 12 shards are written\. Run the same"
    )
    said = re.search(line, errors)
    assert said and 0 < int(said[1]) <= shards(output) < 12, errors
    assert "Traceback" not in errors and "***" not in errors
    assert exact(precompute(recipe_for(images, autoencoder, output), False), output) == etags


def test_two_drivers_on_one_store_write_it_once_and_a_third_recipe_is_refused(
    proxy: FaultProxy, images: str, autoencoder: Path, etags: list[str]
) -> None:
    output = "s3://faulty/shared"
    proxy.latency = 0.02
    other = driver(images, autoencoder, output)
    wait_for(lambda: shards(output) >= 1 or other.poll() is not None)
    with pytest.raises(StoreMismatch, match="precision: fp32 there, bf16 now"):
        precompute(recipe_for(images, autoencoder, output, "precompute.precision=bf16"))
    job = Job(recipe_for(images, autoencoder, output))
    printed, errors = other.communicate(timeout=180)
    proxy.latency = 0.0
    assert other.returncode == 0, errors
    manifest = job.result()
    assert exact(manifest, output) == etags
    assert json.loads(printed)["fingerprint"] == manifest["fingerprint"]


# The clock


def test_a_clock_that_moved_changes_no_decision(
    proxy: FaultProxy, images: str, autoencoder: Path, etags: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "store"
    recipe = recipe_for(images, autoencoder, str(output))
    precompute(recipe, show_progress=False)
    (output / "manifest.json").unlink()
    (output / "shards" / "00000003.parquet").unlink()
    for index, path in enumerate(sorted(output.rglob("*.parquet"))):
        moment = 0 if index % 2 else 4_000_000_000  # 1970 and 2096
        os.utime(path, (moment, moment))
    plan = open_plan(str(output))
    assert missing_shards(str(output), plan) == [3]
    assert exact(precompute(recipe, show_progress=False), str(output)) == etags
