"""An S3 server on a host of its own, and three hosts of a Ray cluster that share nothing else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from tests.hosts import DASHBOARD_PORT, Host, Hosts
from tests.tiny import wait_for

S3_PORT = 9000
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Cluster:
    """Hosts head, one and two, each with a Ray node, and s3, which also submits.

    The head offers no CPU, as in the files of the folder cluster. Each node of the others has two.
    """

    def __init__(self, hosts: Hosts, dashboard: bool) -> None:
        self.hosts = hosts
        self.s3 = hosts.add("s3")
        self.endpoint = f"http://{self.s3.address}:{S3_PORT}"
        with self.s3.network():
            logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
            server = ThreadedMotoServer(ip_address=self.s3.address, port=S3_PORT)
            server.start()
            self._server = server
            self.client.create_bucket(Bucket="bucket")
        self.s3.environment |= self.environment
        self.head, self.one, self.two = (self.add(name) for name in ("head", "one", "two"))
        shown = "--include-dashboard=true" if dashboard else "--include-dashboard=false"
        self.head.start_ray(self.head, shown, "--dashboard-host=0.0.0.0", num_cpus=0)
        for host in (self.one, self.two):
            host.start_ray(self.head)
        self.job_server = f"http://{self.head.address}:{DASHBOARD_PORT}"
        if dashboard:
            wait_for(lambda: self.head.answers(DASHBOARD_PORT))

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

    def add(self, name: str) -> Host:
        """A host that knows the server; Ray is not started."""
        host = self.hosts.add(name)
        host.environment |= self.environment
        return host

    def put(self, key: str, body: bytes) -> None:
        with self.s3.network():
            self.client.put_object(Bucket="bucket", Key=key, Body=body)

    def get(self, key: str) -> bytes:
        with self.s3.network():
            body: bytes = self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
        return body

    def etags(self, prefix: str) -> dict[str, str]:
        """ETags of the objects below `prefix`, by key; at most a thousand."""
        with self.s3.network():
            page = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return {item["Key"]: item["ETag"] for item in page.get("Contents", [])}

    def close(self) -> None:
        self._server.stop()


@contextlib.contextmanager
def cluster_on_hosts(dashboard: bool = False) -> Iterator[Cluster]:
    """A `Cluster`, ended with all its processes."""
    with Hosts() as hosts:
        cluster = Cluster(hosts, dashboard)
        try:
            yield cluster
        finally:
            cluster.close()
