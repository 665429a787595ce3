"""What moto cannot show: signatures, atomic conditional PUTs, a gateway process that is stopped,
kill and resume on a real S3.

Runs where FAE_TEST_S3=1 says that AWS_ENDPOINT_URL and its credentials name a server for tests, on
this machine (Ceph's RADOS gateway, for which the two AWS_*_CHECKSUM_* variables must say
when_required).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from fae.pipelines.latents.manifest import read_manifest
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.storage import paths, s3
from tests.fault_proxy import FaultProxy
from tests.tiny import ROOT, SHARD_SIZE, TINY, noisy_jpegs, save_autoencoder, wait_for

pytestmark = pytest.mark.skipif(
    os.environ.get("FAE_TEST_S3") != "1",
    reason="no real S3 server: set FAE_TEST_S3=1 and AWS_ENDPOINT_URL with its credentials",
)


SIX_GIB = """
import json, os, sys, time
from fae.pipelines.storage import paths, s3

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

size, marks = 6 << 30, range(0, 6 << 30, 333_333_333)
s3.client()
before, started = peak(), time.monotonic()
with paths.writing(sys.argv[1]) as path, open(path, "wb") as file:
    file.truncate(size)
    for place in marks:
        file.seek(place)
        file.write(b"%016d" % place)
written = time.monotonic()
with paths.local_copy(sys.argv[1]) as path, open(path, "rb") as file:
    assert os.path.getsize(path) == size
    for place in marks:
        file.seek(place)
        assert file.read(16) == b"%016d" % place
print(json.dumps([peak() - before, written - started, time.monotonic() - written]))
"""


@pytest.fixture(scope="module")
def base() -> str:
    bucket = f"fae-{uuid.uuid4().hex[:12]}"
    s3.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def test_one_of_many_conditional_writes_wins(base: str) -> None:
    def attempt(uri: str, writer: int) -> bool:
        try:
            paths.write_once(uri, f"writer {writer}".encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        for race in range(20):
            uri = f"{base}/race-{race}"
            won = list(pool.map(lambda writer, uri=uri: attempt(uri, writer), range(16)))
            assert sum(won) == 1
            assert paths.read_bytes(uri) == f"writer {won.index(True)}".encode()


def test_one_of_many_replacements_wins(base: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        for race in range(20):
            uri = f"{base}/replaced-{race}"
            paths.write_bytes(uri, b"first")
            data = [f"writer {writer}".encode() for writer in range(16)]
            won = list(pool.map(lambda mine, uri=uri: paths.replace(uri, b"first", mine), data))
            assert sum(won) == 1
            assert paths.read_bytes(uri) == data[won.index(True)]


def test_a_wrong_secret_is_refused_at_once_and_not_repeated(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)  # another client than the one in use
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marker-wrong-secret")
        for operation in (paths.read_bytes, paths.open_input):
            before = proxy.requests["GET"] + proxy.requests["HEAD"]
            with pytest.raises(paths.StorageError, match=r"denied \(403\)") as raised:
                operation(f"{base}/race-0")
            assert "marker" not in str(raised.value)
            assert proxy.requests["GET"] + proxy.requests["HEAD"] - before == 1


def test_a_gateway_that_is_stopped_for_20_seconds_is_waited_for(base: str) -> None:
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    listening = [
        c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port
    ]
    if not listening or not listening[0].pid:
        pytest.skip("the S3 server is no process of this machine that may be stopped")
    gateway = psutil.Process(listening[0].pid)
    paths.write_bytes(f"{base}/frozen", b"content")
    operations = {
        "read": lambda: paths.read_bytes(f"{base}/frozen"),
        "arrow": lambda: paths.open_input(f"{base}/frozen").read(),
        "write": lambda: paths.write_bytes(f"{base}/written", b"x"),
        "list": lambda: list(paths.list_files(base)),
    }
    with ThreadPoolExecutor(8) as pool:
        gateway.send_signal(signal.SIGSTOP)
        try:
            running = {name: pool.submit(operation) for name, operation in operations.items()}
            time.sleep(20)
            finished = [name for name, future in running.items() if future.done()]
        finally:
            gateway.send_signal(signal.SIGCONT)
        results = {name: future.result(timeout=40) for name, future in running.items()}
    assert not finished
    assert results["read"] == results["arrow"] == b"content" and results["list"]


@pytest.mark.integration
def test_a_killed_driver_resumes_on_a_real_s3(base: str, tmp_path: Path) -> None:
    for index, jpeg in enumerate(noisy_jpegs(200)):
        paths.write_bytes(f"{base}/images/{index:03d}.jpg", jpeg)
    autoencoder = save_autoencoder(tmp_path / "autoencoder.safetensors")
    etags = []
    for output in (f"{base}/killed", f"{base}/undisturbed"):
        command = [
            sys.executable,
            "-m",
            "fae",
            "precompute",
            "photos-dinov2s",
            *TINY,
            f"data.path={base}/images",
            f"autoencoder.checkpoint={autoencoder}",
            f"output={output}",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        if output.endswith("killed"):
            first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
            try:
                wait_for(
                    lambda first=first: (
                        _count(f"{base}/killed/shards") >= 3 or first.poll() is not None
                    )
                )
            finally:
                first.kill()
                first.wait()
            done = _count(f"{output}/shards")
            assert 3 <= done < 200 // SHARD_SIZE and not paths.exists(f"{output}/manifest.json")
        finished = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        assert verify_store(output) == []
        manifest = read_manifest(output) or {}
        assert (manifest["planned"], manifest["stored"]) == (200, 200)
        etags.append([entry["etag"] for entry in manifest["shards"]])
    assert etags[0] == etags[1]


@pytest.mark.faults
def test_an_object_of_six_gib_is_written_and_read_in_the_memory_of_some_parts(base: str) -> None:
    """Needs 6 GiB in the server's store and as much in TMPDIR."""
    result = subprocess.run(
        [sys.executable, "-c", SIX_GIB, f"{base}/six"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    grown, write_s, read_s = json.loads(result.stdout)
    print(f"grown by {grown >> 20} MiB, written in {write_s:.0f} s, read in {read_s:.0f} s")
    assert next(paths.list_files(f"{base}/six")).size == 6 << 30
    paths.delete(f"{base}/six")
    assert grown < 2 * s3.TRANSFER_REQUESTS * s3.RANGE_SIZE + s3.PART_SIZE


def _count(uri: str) -> int:
    return len(list(paths.list_files(uri)))
