"""An S3 server on a host of its own, and the hosts of a Ray cluster that share nothing else.

The tests of whole jobs and of faults between hosts run on it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from tests.hosts import DASHBOARD_PORT, GCS_PORT, Host, Hosts
from tests.tiny import SHARD_SIZE, TINY, wait_for

S3_PORT = 9000
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Cluster:
    """Hosts that share nothing but an S3 server: `head`, `workers`, and `s3`, which also submits.

    The head offers no CPU, as in the files of the folder cluster. Each of the workers has two.
    """

    def __init__(self, hosts: Hosts, num_workers: int, dashboard: bool) -> None:
        self.hosts = hosts
        self.s3 = hosts.add("s3")
        self.endpoint = f"http://{self.s3.address}:{S3_PORT}"
        self.writes: list[tuple[str, str]] = []
        """Address of the host and path of every PUT that the server has answered."""
        self._record_writes()
        with self.s3.network():
            server = ThreadedMotoServer(ip_address=self.s3.address, port=S3_PORT)
            server.start()
            self._server = server
            self.client.create_bucket(Bucket="bucket")
        self.s3.environment |= self.environment
        shown = "--include-dashboard=true" if dashboard else "--include-dashboard=false"
        names = [f"worker{number}" for number in range(num_workers)]
        self.start_ray("head", names, shown, "--dashboard-host=0.0.0.0")
        self.job_server = f"http://{self.head.address}:{DASHBOARD_PORT}"
        if dashboard:
            wait_for(lambda: self.head.answers(DASHBOARD_PORT))

    def start_ray(self, head: str, workers: Sequence[str], *options: str) -> None:
        """A Ray cluster on new hosts of these names, in place of the one before."""
        self.head = self.add(head)
        self.head.start_ray(self.head, *options, num_cpus=0)
        self.workers: list[Host] = []
        """Hosts that run tasks."""
        for name in workers:
            self.add_worker(name)

    @property
    def environment(self) -> dict[str, str]:
        """What every host knows of the S3 server."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint, "FAE_S3_PATIENCE": "120"}

    @property
    def client(self) -> Any:
        """A client of the server; it and its requests belong into `s3.network()`."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )

    def add(self, name: str, disk_mb: int = 2000, shm_mb: int = 500) -> Host:
        """A host that knows the server; Ray is not started."""
        host = self.hosts.add(name, disk_mb, shm_mb)
        host.environment |= self.environment
        return host

    def add_worker(self, name: str, host: Host | None = None) -> Host:
        """A host whose Ray node joins the cluster with two CPUs; `host` where it is there.

        As on Kubernetes, a Ray that ends there is started again.
        """
        host = host or self.add(name)
        host.start_ray(self.head, for_ever=True)
        self.workers.append(host)
        return host

    def put(self, key: str, body: bytes) -> None:
        with self.s3.network():
            self.client.put_object(Bucket="bucket", Key=key, Body=body)

    def get(self, key: str) -> bytes:
        with self.s3.network():
            body: bytes = self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
        return body

    def etags(self, prefix: str) -> dict[str, str]:
        """ETags of the objects below `prefix`, by key."""
        with self.s3.network():
            pages = self.client.get_paginator("list_objects_v2")
            asked = pages.paginate(Bucket="bucket", Prefix=prefix)
            items = [item for page in asked for item in page.get("Contents", [])]
        return {item["Key"]: item["ETag"] for item in items}

    def has(self, key: str) -> bool:
        return key in self.etags(key)

    def put_images(self, images: Iterable[bytes], autoencoder: bytes) -> None:
        """What `precompute` reads."""
        with self.s3.network():
            client = self.client
            for index, image in enumerate(images):
                client.put_object(Bucket="bucket", Key=f"images/{index:06d}.jpg", Body=image)
        self.put("autoencoder.safetensors", autoencoder)

    def precompute(
        self, output: str, *more: str, num_actors: int = 2, **environment: str
    ) -> subprocess.Popen[str]:
        """`fae precompute` of TINY on the head, into the prefix `output`; `more` are settings.

        Two actors leave CPUs of one host for decoding, so one host can finish alone.
        """
        command = [
            "python", "-m", "fae", "precompute", "photos-dinov2s", *TINY,
            f"precompute.num_actors={num_actors}", "precompute.cpus_per_actor=0.6",
            "data.path=s3://bucket/images",
            f"output=s3://bucket/{output}",
            "autoencoder.checkpoint=s3://bucket/autoencoder.safetensors", *more,
        ]  # fmt: skip
        address = {"RAY_ADDRESS": f"{self.head.address}:{GCS_PORT}"}
        return self.head.start(command, {**address, **environment})

    def shards(self, output: str, num_images: int, shard_size: int = SHARD_SIZE) -> dict[str, str]:
        """ETags of the shards of a finished store by name; nothing of it may be missing."""
        manifest = json.loads(self.get(f"{output}/manifest.json"))
        counts = [manifest[name] for name in ("planned", "stored", "errors")]
        assert counts == [num_images, num_images, 0], counts
        found = self.etags(f"{output}/shards/")
        assert len(found) == -(-num_images // shard_size)
        return {key.rpartition("/")[2]: etag for key, etag in found.items()}

    def writers(self, output: str) -> list[str]:
        """The address of the host of every write of a shard."""
        return [host for host, path in self.writes if path.startswith(f"/bucket/{output}/shards/")]

    def _record_writes(self) -> None:
        writes, log = self.writes, logging.getLogger("werkzeug")

        class Recorder(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                host, _, request = record.getMessage().partition(" - - ")
                if '"PUT ' in request:
                    writes.append((host, request.split()[3]))

        log.handlers, log.propagate = [Recorder(logging.INFO)], False
        log.setLevel(logging.INFO)

    def close(self) -> None:
        self._server.stop()


@contextlib.contextmanager
def cluster_on_hosts(num_workers: int = 2, dashboard: bool = False) -> Iterator[Cluster]:
    """A `Cluster`, ended with all its processes."""
    with Hosts() as hosts:
        cluster = Cluster(hosts, num_workers, dashboard)
        try:
            yield cluster
        finally:
            cluster.close()
