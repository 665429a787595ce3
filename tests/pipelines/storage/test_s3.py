"""S3 that falters: every fault is a real one, made by the proxy between the client and a real
server."""

from __future__ import annotations

import io
import os
import random
import re
import socket
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.reading import read_records
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.data.sources import list_images
from fae.pipelines.latents.plan import ensure_plan, open_plan
from fae.pipelines.storage import paths, s3
from tests.fault_proxy import FaultProxy
from tests.tiny import wait_for

SECRET = "marker-secret-of-s3"
BODY = bytes(range(256)) * 2048  # half a MiB: several packets, so that a cut comes in the middle


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "FAE_S3_PATIENCE": "20",
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="faults")
        paths.write_bytes("s3://faults/read.bin", BODY)
        yield proxy


def read_by_arrow(uri: str) -> bytes:
    with paths.open_input(uri) as file:
        return file.read()


OPERATIONS: dict[str, Callable[[], object]] = {
    "read": lambda: paths.read_bytes("s3://faults/read.bin") == BODY,
    "arrow": lambda: read_by_arrow("s3://faults/read.bin") == BODY,
    "write": lambda: paths.write_bytes("s3://faults/written.bin", BODY),
    "list": lambda: len(list(paths.list_files("s3://faults"))) > 0,
    "exists": lambda: paths.exists("s3://faults/read.bin"),
    "delete": lambda: paths.delete("s3://faults/none.bin") is None,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", ["503", "answer lost"])
def test_a_busy_server_and_a_lost_answer_are_asked_again(
    proxy: FaultProxy, operation: str, fault: str
) -> None:
    proxy.inject(fault, 3)
    assert OPERATIONS[operation]()
    assert proxy.injected[fault] == 3


@pytest.mark.parametrize("operation", ["read", "arrow"])
def test_an_answer_that_breaks_off_is_asked_for_again(proxy: FaultProxy, operation: str) -> None:
    proxy.inject("cut answer", 2, lambda method, path: method == "GET")
    assert OPERATIONS[operation]()
    assert proxy.injected["cut answer"] == 2


def test_an_upload_that_is_cut_is_sent_again_whole(proxy: FaultProxy) -> None:
    proxy.inject("cut upload", 2, lambda method, path: method == "PUT")
    paths.write_bytes("s3://faults/cut.bin", BODY)
    assert proxy.injected["cut upload"] == 2
    assert paths.read_bytes("s3://faults/cut.bin") == BODY


@pytest.mark.integration
@pytest.mark.parametrize("operation", ["read", "arrow", "write"])
def test_a_frozen_and_a_restarting_server_are_waited_for(proxy: FaultProxy, operation: str) -> None:
    for begin, end in ((proxy.freeze, proxy.thaw), (proxy.stop, proxy.start)):
        begin()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(OPERATIONS[operation])
            time.sleep(1.5)
            assert not waiting.done()
            end()
            assert waiting.result(timeout=20)


@pytest.mark.parametrize("operation", ["read", "arrow"])
def test_what_is_missing_or_forbidden_is_asked_for_once(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    read = paths.read_bytes if operation == "read" else read_by_arrow
    before = sum(proxy.requests[name] for name in ("GET", "HEAD"))
    with pytest.raises(paths.StorageError, match=r"bucket 'faults', key 'none.bin'.*404"):
        read("s3://faults/none.bin")
    with pytest.raises(paths.StorageError, match="bucket does not exist|404"):
        read("s3://no-such-bucket/x")
    assert sum(proxy.requests[name] for name in ("GET", "HEAD")) - before <= 4


def test_retries_end_with_what_to_check_and_no_secret(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAE_S3_PATIENCE", "1")
    proxy.inject("503", 1000)
    pauses: list[float] = []
    # A clock on which nothing but the pauses takes time: a busy machine changes no count.
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(s3, "time", clock)
    for operation, word in (("read", "open|read"), ("arrow", "open"), ("write", "write")):
        pauses.clear()
        before = proxy.injected["503"]
        with pytest.raises(paths.StorageError, match=f"Cannot ({word}).*too busy") as raised:
            OPERATIONS[operation]()
        assert SECRET not in str(raised.value)
        attempts = proxy.injected["503"] - before
        if operation == "arrow":
            assert attempts == 7  # with pauses of 25 ms, doubled each time, between them
        else:
            assert 2 <= attempts == len(pauses) + 1 and sum(pauses) <= 1


def test_a_long_wait_is_said(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3, "SAID_AFTER", 0.2)
    proxy.inject("503", 4)
    assert paths.exists("s3://faults/read.bin")
    assert f"S3 at {proxy.url}: " in caplog.text and "trying for 20 s" in caplog.text


@pytest.mark.integration
def test_requests_that_are_tried_again_are_counted_where_prometheus_looks(
    proxy: FaultProxy,
) -> None:
    import ray

    from fae.pipelines.runtime.session import start_ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    proxy.inject("503", 1)
    assert OPERATIONS["read"](), "without Ray nobody counts"
    often = {"metrics_report_interval_ms": 500}
    start_ray(num_cpus=1, _metrics_export_port=port, _system_config=often)
    try:
        proxy.inject("503", 2, lambda method, path: method == "GET")
        assert OPERATIONS["read"]()
        deadline = time.monotonic() + 120
        found = None
        while found is None:
            assert time.monotonic() < deadline, "no such metric came"
            time.sleep(0.5)
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).read().decode()
            except urllib.error.URLError:
                continue
            found = re.search(r"^ray_fae_s3_retries_total{(.*)} (.*)$", text, re.M)
        assert float(found[2]) == 2.0
        assert 'operation="read"' in found[1] and re.search(r'cause="(503|SlowDown)"', found[1])
    finally:
        ray.shutdown()


def test_many_threads_outlast_a_fault_that_would_use_up_a_shared_quota(proxy: FaultProxy) -> None:
    proxy.inject("503", 120)  # botocore's quota holds 100 such retries, for all threads together
    with ThreadPoolExecutor(32) as pool:
        bodies = list(pool.map(paths.read_bytes, ["s3://faults/read.bin"] * 64))
    assert all(body == BODY for body in bodies)


def test_write_once_knows_its_own_write_whose_answer_was_lost(proxy: FaultProxy) -> None:
    proxy.inject("answer lost", 1, lambda method, path: method == "PUT")
    paths.write_once("s3://faults/manifest.json", b"mine")
    assert proxy.injected["answer lost"] == 1
    assert paths.read_bytes("s3://faults/manifest.json") == b"mine"
    proxy.inject("answer lost", 1, lambda method, path: method == "PUT")
    with pytest.raises(FileExistsError):
        paths.write_once("s3://faults/manifest.json", b"yours")
    with pytest.raises(FileExistsError):
        paths.write_once("s3://faults/manifest.json", b"mine")


def test_replace_knows_its_own_write_whose_answer_was_lost(proxy: FaultProxy) -> None:
    paths.write_bytes("s3://faults/renewed.json", b"first")
    proxy.inject("answer lost", 1, lambda method, path: method == "PUT")
    assert paths.replace("s3://faults/renewed.json", b"first", b"mine")
    assert proxy.injected["answer lost"] == 1
    assert not paths.replace("s3://faults/renewed.json", b"first", b"yours")
    assert paths.read_bytes("s3://faults/renewed.json") == b"mine"


def test_a_listing_of_several_pages_goes_on_where_it_was_interrupted(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    names = [f"pages/{i:05d} é" for i in range(25)]
    for name in names:
        paths.write_bytes(f"s3://faults/{name}", b"")
    proxy.inject("cut answer", 2, lambda method, path: "continuation-token" in path)
    found = [file.uri for file in paths.list_files("s3://faults/pages")]
    assert found == [f"s3://faults/{name}" for name in names]
    assert proxy.injected["cut answer"] == 2


@pytest.mark.parametrize("operation", ["list_objects_v2", "get_object"])
def test_times_are_those_that_the_library_parses(proxy: FaultProxy, operation: str) -> None:
    """A listing writes times as ISO 8601 does, a header as HTTP does."""

    def time_of(client: Any) -> datetime:
        if operation == "list_objects_v2":
            found = client.list_objects_v2(Bucket="faults", Prefix="read.bin")["Contents"][0]
        else:
            found = client.get_object(Bucket="faults", Key="read.bin")
        return found["LastModified"]

    assert time_of(s3.client()) == time_of(boto3.client("s3", endpoint_url=proxy.url))


def test_public_objects_are_read_without_credentials(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client().put_object_acl(Bucket="faults", Key="read.bin", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    # Another endpoint is another client: the one in use has found its credentials.
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url.replace("127.0.0.1", "localhost"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(paths.StorageError, match="no AWS credentials"):
        paths.read_bytes("s3://faults/read.bin")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert OPERATIONS["read"]() and OPERATIONS["arrow"]()


@pytest.mark.parametrize("read", [paths.read_bytes, read_by_arrow])
def test_credentials_that_are_set_after_an_error_are_used(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Callable[[str], bytes]
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("FAE_S3_PATIENCE", "0")
    given = os.environ["AWS_ACCESS_KEY_ID"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(paths.StorageError, match="no AWS credentials|access denied"):
        read("s3://faults/read.bin")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", given)
    assert read("s3://faults/read.bin") == BODY


def test_a_renewed_token_is_used(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("first-marker-token", "second-marker-token"):
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
        paths.read_bytes("s3://faults/read.bin")
        assert proxy.last_headers["X-Amz-Security-Token"] == token


def test_threads_that_begin_together_make_one_client(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAE_S3_PATIENCE", "19")  # no other test's client
    with ThreadPoolExecutor(16) as pool:
        clients = list(pool.map(lambda _: s3.client(), range(16)))
    assert len(set(map(id, clients))) == 1


def test_buckets_are_addressed_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")

    def address() -> str:
        asked = {"Bucket": "bucket", "Key": "key"}
        return s3.client().generate_presigned_url("get_object", Params=asked).partition("?")[0]

    assert address() == "http://store.example:9000/bucket/key"
    monkeypatch.setenv("FAE_S3_ADDRESSING", "virtual")
    assert address() == "http://bucket.store.example:9000/key"


@pytest.mark.parametrize(
    ("name", "value"), [("FAE_S3_ADDRESSING", "pat"), ("FAE_S3_PATIENCE", "long")]
)
def test_a_setting_that_means_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(s3.S3SettingsError, match=f"{name}='{value}'"):
        paths.read_bytes("s3://bucket/key")


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(paths.StorageError, match="holds no credentials") as raised:
        paths.read_bytes(f"s3://key:{SECRET}@bucket/object")
    assert SECRET not in str(raised.value)


def test_a_row_group_is_read_in_ranges(proxy: FaultProxy) -> None:
    import numpy as np
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    noise = np.random.default_rng(0).bytes(2_000_000)
    table = pa.table({"image": [noise[i * 10_000 : (i + 1) * 10_000] for i in range(200)]})
    pq.write_table(table, sink, row_group_size=10, compression="none", use_dictionary=False)
    paths.write_bytes("s3://faults/x.parquet", sink.getvalue().to_pybytes())
    before = proxy.bytes_down
    with paths.open_input("s3://faults/x.parquet") as file:
        pq.ParquetFile(file, pre_buffer=True).read_row_group(3)
    assert 100_000 <= proxy.bytes_down - before < 300_000


def test_a_tar_is_planned_and_read_in_ranges(proxy: FaultProxy) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(8):
            info = tarfile.TarInfo(f"{index}.jpg")
            info.size = 2_000_000
            tar.addfile(info, io.BytesIO(bytes([index]) * info.size))
    paths.write_bytes("s3://faults/tars/s.tar", buffer.getvalue())
    data = DataSection(path="s3://faults/tars")
    before = proxy.bytes_down
    records = list_images(data)
    assert proxy.bytes_down - before < 8 * 300_000  # of 16 MB
    before = proxy.bytes_down
    assert read_records(records[2:4], data) == [bytes([2]) * 2_000_000, bytes([3]) * 2_000_000]
    assert proxy.bytes_down - before < 4_100_000


@pytest.fixture(params=["objects", "tar", "parquet"])
def source(request: pytest.FixtureRequest, proxy: FaultProxy) -> Any:
    """Four images on S3 as objects, in a tar or in Parquet: records, and how they are read."""
    uri, images = f"s3://faults/source-{request.param}", [bytes([65 + i]) * 9 for i in range(4)]
    buffer = io.BytesIO()
    if request.param == "objects":
        for index, image in enumerate(images):
            paths.write_bytes(f"{uri}/{index}.jpg", image)
    elif request.param == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for index, image in enumerate(images):
                info = tarfile.TarInfo(f"{index}.jpg")
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
        paths.write_bytes(f"{uri}/s.tar", buffer.getvalue())
    else:
        pq.write_table(pa.table({"image": images}), buffer)
        paths.write_bytes(f"{uri}/s.parquet", buffer.getvalue())
    data = DataSection(path=uri)
    records = list_images(data)
    assert read_records(records, data) == images
    return records, data


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "access denied"),
        (403, "InvalidAccessKeyId", "access denied"),
        (400, "ExpiredToken", "may have expired"),
        (503, "SlowDown", "too busy"),
    ],
)
def test_a_storage_that_refuses_all_is_no_error_of_its_images(
    proxy: FaultProxy,
    source: Any,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    words: str,
) -> None:
    monkeypatch.setenv("FAE_S3_PATIENCE", "0")
    proxy.refusal = (status, code, "/source-")
    with pytest.raises(paths.StorageError, match=words):
        read_records(*source)


def test_a_storage_that_is_away_is_no_error_of_its_images(
    proxy: FaultProxy, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAE_S3_PATIENCE", "0")
    proxy.stop()
    with pytest.raises(paths.StorageError, match="no connection"):
        read_records(*source)


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidObjectState", "NoSuchKey"])
def test_one_object_that_is_denied_archived_or_gone_is_an_error_of_its_image(
    proxy: FaultProxy, code: str
) -> None:
    for name in "abc":
        paths.write_bytes(f"s3://faults/some/{name}.jpg", name.encode())
    data = DataSection(path="s3://faults/some")
    records = list_images(data)
    proxy.refusal = (404 if code == "NoSuchKey" else 403, code, "/some/b.jpg")
    first, second, third = read_records(records, data)
    assert (first, third) == (b"a", b"c") and isinstance(second, paths.StorageError)
    (alone,) = read_records(records[1:2], data)
    assert isinstance(alone, paths.StorageError)


def test_damage_of_a_file_on_s3_is_an_error_of_its_images(proxy: FaultProxy) -> None:
    buffer = io.BytesIO()
    table = pa.table({"image": [random.randbytes(2000) for _ in range(4)]})
    pq.write_table(table, buffer, row_group_size=2, compression="zstd", use_dictionary=False)
    paths.write_bytes("s3://faults/damaged/s.parquet", buffer.getvalue())
    data = DataSection(path="s3://faults/damaged")
    records = list_images(data)
    damaged = bytearray(buffer.getvalue())
    place = pq.ParquetFile(buffer).metadata.row_group(1).column(0).data_page_offset
    damaged[place : place + 60] = bytes(60)
    paths.write_bytes("s3://faults/damaged/s.parquet", bytes(damaged))
    read = read_records(records, data)
    assert read[:2] == table["image"].to_pylist()[:2]
    assert all("is not readable Parquet" in str(error) for error in read[2:])


def test_a_plan_is_read_by_shards(proxy: FaultProxy) -> None:
    records = [ImageRecord(f"{i:06d}", f"s3://faults/{random.random()}") for i in range(20_000)]
    plan = ensure_plan("s3://faults/store", records, 500, {})
    size = next(paths.list_files("s3://faults/store/plan.parquet")).size
    before = proxy.bytes_down
    assert open_plan("s3://faults/store").shard(7) == records[3500:4000]
    assert plan.num_shards == 40 and proxy.bytes_down - before < size / 2


@pytest.mark.parametrize("kind", ["objects", "tar"])
def test_many_small_images_are_in_flight_at_once(proxy: FaultProxy, kind: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(64):
            info = tarfile.TarInfo(f"{index:02d}.jpg")
            info.size = 10
            tar.addfile(info, io.BytesIO(b"0123456789"))
            if kind == "objects":
                paths.write_bytes(f"s3://faults/many-{kind}/{index:02d}.jpg", b"0123456789")
    if kind == "tar":
        paths.write_bytes(f"s3://faults/many-{kind}/s.tar", buffer.getvalue())
    data = DataSection(path=f"s3://faults/many-{kind}")
    records = list_images(data)
    proxy.hold("GET")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_records, records, data)
        try:
            wait_for(lambda: proxy.num_held >= 16, seconds=20)
        finally:
            proxy.release()
        assert reading.result() == [b"0123456789"] * 64
