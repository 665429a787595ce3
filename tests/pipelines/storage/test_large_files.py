"""Files above the limit of one PUT: a server that takes 5 MiB stands for one that takes 5 GiB.

Faults and kills in the middle of an upload leave the object before it whole, and no parts that
`fae doctor` does not name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.storage import paths, s3
from fae.pipelines.storage.temporary import temporary_folder
from tests.fault_proxy import FaultProxy
from tests.tiny import ROOT, wait_for

BODY = b"".join(bytes([i]) * (1 << 20) for i in range(12)) + b"the end"  # three parts
WRITE = """
import sys
from fae.pipelines.storage import paths, s3
s3.PART_SIZE = 5 << 20
with paths.writing(sys.argv[1]) as path:
    path.write_bytes(bytes(12 << 20))
"""


def write(uri: str, body: bytes = BODY) -> None:
    with paths.writing(uri) as path:
        path.write_bytes(body)


def read(uri: str) -> bytes:
    with paths.local_copy(uri) as path:
        return path.read_bytes()


@pytest.fixture
def folder(limited_s3: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """An s3:// folder; the temporary directory is one of the test's own, left empty."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield f"s3://large/{tmp_path.name}"
    assert list(temporary.iterdir()) == []


def unfinished(folder: str, s3_server: str) -> list[str]:
    client = boto3.client("s3", endpoint_url=s3_server)
    prefix = folder.removeprefix("s3://large/")
    answer = client.list_multipart_uploads(Bucket="large", Prefix=prefix)
    return [upload["Key"] for upload in answer.get("Uploads", [])]


def test_a_file_of_any_size_is_written_replaced_and_read_back(root: str) -> None:
    uri = paths.join(root, "folder", "large.bin")
    for body in (BODY, b"", b"small"):
        write(uri, body)
        assert read(uri) == body
    assert [file.uri for file in paths.list_files(root)] == [uri]


def test_a_block_that_fails_leaves_what_was_there(root: str) -> None:
    uri = paths.join(root, "large.bin")
    write(uri, b"before")
    with pytest.raises(ZeroDivisionError), paths.writing(uri) as path:
        path.write_bytes(b"half")
        _ = 1 / 0
    assert read(uri) == b"before"
    assert [file.uri for file in paths.list_files(root)] == [uri]


def test_what_one_put_cannot_hold_is_sent_and_read_in_parts(
    limited_s3: FaultProxy, folder: str
) -> None:
    with pytest.raises(paths.StorageError, match="EntityTooLarge"):
        paths.write_bytes(f"{folder}/large.bin", BODY)
    write(f"{folder}/large.bin")
    (file,) = paths.list_files(folder)
    assert file.size == len(BODY) and (file.etag or "").endswith("-3")
    before = limited_s3.requests["GET 206"]
    assert read(f"{folder}/large.bin") == BODY
    assert limited_s3.requests["GET 206"] - before == 3


@pytest.mark.parametrize("kind", ["503", "cut upload", "answer lost"])
@pytest.mark.parametrize("request_", ["PUT", "POST"])
def test_each_request_of_an_upload_is_retried_by_itself(
    limited_s3: FaultProxy, folder: str, s3_server: str, kind: str, request_: str
) -> None:
    # POST begins an upload and completes it; the begun one whose answer is lost stays.
    limited_s3.inject(kind, 2, lambda method, path: method == request_)
    limited_s3.inject(kind, 1, lambda method, path: method == "POST" and "uploadId=" in path)
    write(f"{folder}/large.bin")
    assert limited_s3.injected[kind] == 3
    assert read(f"{folder}/large.bin") == BODY
    lost = 2 if (kind, request_) == ("answer lost", "POST") else 0
    assert len(unfinished(folder, s3_server)) == lost


@pytest.mark.parametrize("kind", ["503", "cut answer", "answer lost"])
def test_each_range_of_a_read_is_retried_by_itself(
    limited_s3: FaultProxy, folder: str, kind: str
) -> None:
    write(f"{folder}/large.bin")
    limited_s3.inject(kind, 7, lambda method, path: method == "GET")
    assert read(f"{folder}/large.bin") == BODY
    assert limited_s3.injected[kind] == 7


@pytest.mark.parametrize("stopped", ["partNumber=2", "uploadId="])
def test_an_upload_that_fails_leaves_the_object_before_it_and_no_parts(
    limited_s3: FaultProxy,
    folder: str,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
    stopped: str,
) -> None:
    write(f"{folder}/large.bin")
    monkeypatch.setenv("FAE_S3_PATIENCE", "0")
    method_ = "PUT" if stopped.startswith("part") else "POST"
    limited_s3.inject("cut upload", 1, lambda method, path: method == method_ and stopped in path)
    with pytest.raises(paths.StorageError, match=r"Cannot write .*large.bin"):
        write(f"{folder}/large.bin", BODY[::-1])
    assert limited_s3.injected["cut upload"] == 1
    assert read(f"{folder}/large.bin") == BODY
    assert unfinished(folder, s3_server) == []


def test_a_missing_object_and_one_that_is_replaced_meanwhile_are_said(
    limited_s3: FaultProxy, folder: str
) -> None:
    with pytest.raises(paths.StorageError, match=r"none.bin.*404"):
        read(f"{folder}/none.bin")
    write(f"{folder}/large.bin")
    limited_s3.hold("GET")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, f"{folder}/large.bin")
        try:
            wait_for(lambda: limited_s3.num_held > 0)
            write(f"{folder}/large.bin", BODY[::-1])
        finally:
            limited_s3.release()
        with pytest.raises(paths.StorageError, match=r"large.bin was replaced while it was read"):
            reading.result()


@pytest.mark.integration
def test_a_killed_writer_leaves_the_object_before_and_parts_that_doctor_names_and_removes(
    limited_s3: FaultProxy, folder: str, s3_server: str
) -> None:
    write(f"{folder}/large.bin")
    limited_s3.hold("PUT")
    command = [sys.executable, "-c", WRITE, f"{folder}/large.bin"]
    writer = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: limited_s3.num_held > 1)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        limited_s3.release()
    assert read(f"{folder}/large.bin") == BODY
    assert len(unfinished(folder, s3_server)) == 1

    def doctor(*options: str) -> str:
        result = CliRunner().invoke(app, ["doctor", folder, *options])
        assert result.exit_code == 0, result.output
        return result.output

    named = doctor()
    assert "1 unfinished upload below" in named and "large.bin since" in named
    assert f"`fae doctor {folder}/ --abort-uploads`" in named
    assert len(unfinished(folder, s3_server)) == 1, "it only looks"
    assert "aborted 1 unfinished upload" in doctor("--abort-uploads")
    assert unfinished(folder, s3_server) == [] and "unfinished" not in doctor()
    assert read(f"{folder}/large.bin") == BODY


def test_the_temporary_files_of_a_killed_process_are_removed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = "\n".join(
        (
            "import time",
            "from fae.pipelines.storage.temporary import temporary_folder",
            "with temporary_folder() as folder:",
            "    (folder / 'half').write_bytes(b'x')",
            "    time.sleep(600)",
        )
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_for(lambda: list(tmp_path.glob("fae-files-*/half")))
        with temporary_folder() as own:
            assert len(list(tmp_path.iterdir())) == 2
    finally:
        other.kill()
        other.wait()
    with temporary_folder() as own:
        assert list(tmp_path.iterdir()) == [own]


def test_constants_are_within_the_limits_of_s3() -> None:
    assert 5 << 20 <= s3.PART_SIZE <= 5 << 30
    assert s3.TRANSFER_REQUESTS <= s3.CONNECTIONS
