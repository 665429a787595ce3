"""What several test modules share: an S3 server and a Hub on loopback, photographs, and one local
Ray a module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Read when torch is imported. The tests' processes share few cores, and waiting threads would spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import boto3
import hypothesis
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from fae.pipelines.storage import s3
from tests.fault_proxy import FaultProxy
from tests.hub_server import TOKEN, HubServer, hub_server

# A deadline would be one of the machine, which may be busy.
hypothesis.settings.register_profile("fae", deadline=None)
hypothesis.settings.load_profile("fae")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def limited_s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server with the bucket `large`: 5 MiB for one PUT, as S3 has 5 GiB."""
    limit = 5 << 20
    monkeypatch.setattr(s3, "PART_SIZE", limit)
    monkeypatch.setattr(s3, "RANGE_SIZE", limit)
    with FaultProxy(s3_server) as proxy:
        proxy.put_limit = limit
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "FAE_S3_PATIENCE": "20",
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="large")
        yield proxy


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path)
    endpoint = request.getfixturevalue("s3_server")
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-for-messages",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback, which this process takes for the Hugging Face Hub."""
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data's jobs run in this process: for tests of what becomes of their rows."""
    from tests.here import leave_ray_out

    leave_ray_out(monkeypatch)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 JPEG crops of scikit-image's photographs, 200 to 280 px."""
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = Image.fromarray(getattr(skimage.data, name)())
        for index in range(24):
            left, side = index * 4, 200 + index * 4
            crop = picture.crop((left, index, left + side, index + side))
            crop.save(folder / f"{name} {index:02d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def write_store():
    """Writes a store of 20 rows in shards of 8, latents [2, 3, 3], labels 0 … 4; row i's mean is
    near i, mirrored i + 100. `captions` are (first, all or None) by row."""
    from fae.pipelines.data.records import ImageRecord
    from fae.pipelines.latents.manifest import commit
    from fae.pipelines.latents.plan import ensure_plan
    from fae.pipelines.latents.reader import LatentStore
    from fae.pipelines.latents.shards import write_shard

    shape = (2, 3, 3)
    every_column = ("mean", "logvar", "mean_flip", "logvar_flip")

    def write_store(
        folder, columns=every_column, labels=True, captions=None, parts=None
    ) -> LatentStore:
        records = [
            ImageRecord(
                f"{i:03d}", f"/x/{i}", i % 5 if labels else None, *(captions or {}).get(i, ())
            )
            for i in range(20)
        ]
        parts = parts or {"autoencoder weights": "abc"}
        plan = ensure_plan(str(folder), records, 8, parts)
        random = np.random.default_rng(0)
        for shard in range(plan.num_shards):
            rows = plan.shard(shard)
            first = int(rows[0].key)
            values = {}
            for column in columns:
                noise = random.normal(size=(len(rows), *shape)).astype(np.float16)
                # The row's number and whether it is mirrored can be read off the mean.
                mark = np.arange(first, first + len(rows)) + (100 if column == "mean_flip" else 0)
                is_mean = column.startswith("mean")
                values[column] = (noise * 0.01 + mark[:, None, None, None] * is_mean).astype(
                    np.float16
                )
            write_shard(
                str(folder),
                shard,
                rows,
                list(range(len(rows))),
                values,
                [],
                plan.fingerprint,
                plan.has_captions,
            )
        commit(str(folder), plan, {})
        return LatentStore.open(str(folder))

    return write_store


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of torch-fidelity's file: its own network's, saved before it
    loads any."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True):
            for module in self.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight)

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.save(Untrained("random", ["2048"], str(path)).state_dict(), path)
    return path
