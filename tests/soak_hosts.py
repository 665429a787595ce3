"""The soak on hosts: precompute while links fail, hosts die and others take their place.

`python -m tests.soak --hosts 3` runs it. The S3 server is moto on a host of its own.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.s3_host import Cluster, cluster_on_hosts
from tests.tiny import noisy_jpegs, save_autoencoder

PAUSE = (10.0, 25.0)
"""Seconds between faults."""


def soak(num_hosts: int, num_images: int, minutes: float) -> None:
    """Print each fault, the account of each store, and the counts at the end."""
    with (
        tempfile.TemporaryDirectory() as work,
        ThreadPoolExecutor(1) as reading,
        cluster_on_hosts(num_workers=num_hosts) as cluster,
    ):
        autoencoder = save_autoencoder(Path(work) / "autoencoder.safetensors")
        cluster.put_images(noisy_jpegs(num_images), autoencoder.read_bytes())
        faults: Counter[str] = Counter()
        starts = stores = written = 0
        first: dict[str, str] = {}
        started = time.monotonic()
        while time.monotonic() - started < 60 * minutes or not stores:
            output = f"store-{stores}"
            while not cluster.has(f"{output}/manifest.json"):
                job = cluster.precompute(output, num_actors=num_hosts)
                starts += 1
                assert job.stdout is not None
                printed = reading.submit(job.stdout.read)  # a full pipe would stop the job
                while job.poll() is None:
                    time.sleep(random.uniform(*PAUSE))
                    if job.poll() is None and time.monotonic() - started < 60 * minutes:
                        faults[disturb(cluster)] += 1
                        print(f"{time.monotonic() - started:6.0f} s  {dict(faults)}", flush=True)
                if job.returncode:
                    faults["driver ended by itself"] += 1
                    said = printed.result()[-2000:]
                    print(f"the driver ended with {job.returncode}:\n{said}", flush=True)
            shards = cluster.shards(output, num_images)
            first = first or shards
            assert shards == first, "the store differs from the first"
            written += len(cluster.writers(output))
            stores += 1
            print(f"{output}: {num_images} of {num_images}, as in the first store", flush=True)
        figures = {
            "seconds": round(time.monotonic() - started),
            "hosts": num_hosts,
            "stores": stores,
            "images of each": num_images,
            "shards written twice": written - stores * len(first),
            "driver starts": starts,
            "faults": dict(faults),
        }
        print(json.dumps(figures, indent=1))


def disturb(cluster: Cluster) -> str:
    """Do one thing of the list to one host; its name."""
    kind = random.choice(["link down 5 s", "S3 unreachable 10 s", "slow link 10 s", "host killed"])
    host = random.choice(cluster.workers)
    if kind == "link down 5 s":
        cluster.hosts.cut(host)
        time.sleep(5)
        cluster.hosts.mend(host)
    elif kind == "S3 unreachable 10 s":
        host.lose(cluster.s3)
        time.sleep(10)
        host.find(cluster.s3)
    elif kind == "slow link 10 s":
        host.slow("500kbit")
        time.sleep(10)
        host.fast()
    else:
        host.kill()
        cluster.workers.remove(host)
        cluster.add_worker(f"host{len(cluster.hosts.hosts)}")
    return kind
