"""The soak: precompute from S3 to S3 while something goes wrong every few seconds, then a manifest
that must be exact.

    eval "$(ceph-s3 env DIR)"; python -m tests.soak --images 20000 --minutes 10

AWS_* name a real S3 server and --bucket one of its buckets. Faults come from the proxy before it
and from SIGKILL; a driver that died is started again, a store that is finished early is followed by
another. Not part of the tests.

With --hosts 3 it runs on so many hosts of a Ray cluster instead, whose links fail and which are
lost (soak_hosts.py). That needs root, and no S3 server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from fae.pipelines.latents.manifest import read_manifest
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.storage import paths, s3
from tests.fault_proxy import FaultProxy
from tests.tiny import TINY, noisy_jpegs, save_autoencoder

ROOT = Path(__file__).parents[1]
PAUSE = (2.0, 8.0)
"""Seconds between faults."""
FREEZE = 20.0


class Driver:
    """`python -m fae precompute` and the Ray that it starts."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "fae", "precompute", "photos-dinov2s", *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def workers(self, title: str) -> list[psutil.Process]:
        found = []
        for child in self.family():
            try:
                if title in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        family = self.family()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()

    def printed(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def upload(images: str, count: int) -> None:
    there = {file.uri for file in paths.list_files(images)}
    wanted = ((f"{images}/{i:06d}.jpg", jpeg) for i, jpeg in enumerate(noisy_jpegs(count)))
    with ThreadPoolExecutor(16) as pool:
        missing = (item for item in wanted if item[0] not in there)
        list(pool.map(lambda item: paths.write_bytes(*item), missing))


def disturb(proxy: FaultProxy, driver: Driver) -> str:
    """Do one thing of the list; its name."""
    title = {
        "decode task killed": "ray::Map(decode_shard)",
        "writer killed": "ray::Map(store_shard)",
        "actor killed": "MapBatches(EncodeShards)",
    }
    kinds = [*title, "503", "cut upload", "cut answer", "answer lost", "slow", "restart", "freeze"]
    kind = random.choice([*kinds, *kinds, "driver killed"])
    if kind in title:
        victims = driver.workers(title[kind])
        if not victims:
            return f"{kind}: none there"
        random.choice(victims).kill()
    elif kind == "slow":
        proxy.latency = 0.5
        time.sleep(3)
        proxy.latency = 0.0
    elif kind == "503":
        proxy.busy = True
        time.sleep(3)
        proxy.busy = False
    elif kind == "restart":
        proxy.stop()
        time.sleep(3)
        proxy.start()
    elif kind == "freeze":
        proxy.freeze()
        time.sleep(FREEZE)
        proxy.thaw()
    elif kind == "driver killed":
        driver.kill()
    else:
        proxy.inject(kind, 5)  # type: ignore[arg-type]
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--bucket", default="soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    if options.hosts:
        from tests.soak_hosts import soak

        soak(options.hosts, options.images, options.minutes)
        return
    s3.client().create_bucket(Bucket=options.bucket)
    base = f"s3://{options.bucket}"
    upload(f"{base}/images", options.images)
    name = time.strftime("%H%M%S")
    faults: Counter[str] = Counter()
    starts = stores = 0
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, tempfile.TemporaryDirectory() as work:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        autoencoder = save_autoencoder(Path(work) / "autoencoder.safetensors")
        values = [
            *TINY,
            f"data.path={base}/images",
            f"autoencoder.checkpoint={autoencoder}",
            "precompute.shard_size=50",
        ]
        started = time.monotonic()
        while time.monotonic() - started < 60 * options.minutes:
            output, finished = f"{base}/store-{name}-{stores}", False
            while not finished:
                driver = Driver([*values, f"output={output}"], Path(work) / "driver.log")
                starts += 1
                while driver.process.poll() is None:
                    time.sleep(random.uniform(*PAUSE))
                    if (
                        driver.process.poll() is None
                        and time.monotonic() - started < 60 * options.minutes
                    ):
                        faults[disturb(proxy, driver)] += 1
                        print(f"{time.monotonic() - started:6.0f} s  {dict(faults)}", flush=True)
                finished = driver.process.returncode == 0
                if not finished and driver.process.returncode != -signal.SIGKILL:
                    print(f"the driver ended with {driver.process.returncode}:\n{driver.printed()}")
                    faults["driver ended by itself"] += 1
            stores += 1
            problems = verify_store(output)
            manifest = read_manifest(output) or {}
            counts = {key: manifest.get(key) for key in ("planned", "stored", "errors")}
            print(f"{output}: {counts}, problems {problems}", flush=True)
            assert problems == [] and counts["planned"] == counts["stored"] == options.images
        seconds = time.monotonic() - started
    figures = {
        "seconds": round(seconds),
        "stores": stores,
        "images": options.images,
        "driver starts": starts,
        "faults": dict(faults),
        "requests met by a fault": dict(proxy.injected),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
