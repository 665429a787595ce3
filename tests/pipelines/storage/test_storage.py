"""Storage on a local folder and on an S3 server on loopback.

Whole writes, write-once in a race, listing, errors that say what to check and hold no secret.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fae.pipelines.storage import paths


def test_what_is_written_is_read_back_and_replaced_whole(root: str) -> None:
    uri = paths.join(root, "shards", "0.bin")
    for content in (b"first", b"second"):
        assert paths.write_bytes(uri, content) == hashlib.md5(content).hexdigest()
        assert paths.read_bytes(uri) == content
    assert [file.uri for file in paths.list_files(root)] == [uri]


def test_write_once_never_replaces_and_leaves_no_temporary(root: str) -> None:
    uri = paths.join(root, "manifest.json")
    assert paths.write_once(uri, b"mine") == hashlib.md5(b"mine").hexdigest()
    with pytest.raises(FileExistsError):
        paths.write_once(uri, b"yours")
    assert paths.read_bytes(uri) == b"mine"
    assert [file.uri for file in paths.list_files(root)] == [uri]


def test_replace_leaves_alone_what_another_has_written(root: str) -> None:
    uri = paths.join(root, "manifest.json")
    paths.write_bytes(uri, b"first")
    assert paths.replace(uri, b"first", b"mine")
    assert not paths.replace(uri, b"first", b"yours")
    assert paths.read_bytes(uri) == b"mine"
    with pytest.raises(paths.FileError, match="it is not there"):
        paths.replace(paths.join(root, "absent.json"), b"first", b"mine")


def test_one_of_many_racing_replacements_wins(root: str) -> None:
    uri = paths.join(root, "manifest.json")
    paths.write_bytes(uri, b"first")
    with ThreadPoolExecutor(8) as pool:
        data = [str(writer).encode() for writer in range(8)]
        won = list(pool.map(lambda mine: paths.replace(uri, b"first", mine), data))
    assert sum(won) == 1
    assert paths.read_bytes(uri) == data[won.index(True)]


def test_one_of_many_racing_writers_wins(root: str) -> None:
    uri = paths.join(root, "manifest.json")

    def attempt(writer: int) -> int | None:
        try:
            paths.write_once(uri, str(writer).encode())
        except FileExistsError:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        winners = [writer for writer in pool.map(attempt, range(8)) if writer is not None]
    assert len(winners) == 1
    assert paths.read_bytes(uri) == str(winners[0]).encode()


def test_listing_is_recursive_on_request_and_never_takes_a_sibling(root: str) -> None:
    for name in ("a/1", "a/b/2", "ab/3"):
        paths.write_bytes(paths.join(root, name), b"xy")
    folder = paths.join(root, "a")
    assert {(f.uri, f.size) for f in paths.list_files(folder)} == {
        (paths.join(root, "a/1"), 2),
        (paths.join(root, "a/b/2"), 2),
    }
    flat = [f.uri for f in paths.list_files(folder, recursive=False)]
    assert flat == [paths.join(root, "a/1")]
    assert [f.uri for f in paths.list_files(paths.join(root, "a/1"))] == flat
    assert list(paths.list_files(paths.join(root, "none"))) == []


def test_exists_knows_files_and_folders_but_not_beginnings_of_names(root: str) -> None:
    paths.write_bytes(paths.join(root, "folder/file.txt"), b"x")
    assert paths.exists(paths.join(root, "folder/file.txt"))
    assert paths.exists(paths.join(root, "folder"))
    assert paths.exists(paths.join(root, "folder/"))
    assert not paths.exists(paths.join(root, "fold"))


def test_arrow_reads_what_was_written(root: str) -> None:
    uri = paths.join(root, "with space é.bin")
    paths.write_bytes(uri, b"0123456789")
    filesystem, path = paths.filesystem(uri)
    with filesystem.open_input_file(path) as file:
        file.seek(3)
        assert file.read(4) == b"3456"


def test_a_missing_file_says_what_to_check(root: str) -> None:
    uri = paths.join(root, "none.bin")
    for read in (paths.read_bytes, paths.open_input):
        with pytest.raises(paths.StorageError, match=r"none\.bin.*404.*Check"):
            read(uri)


def test_a_server_that_is_not_there_is_named_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-messages")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("FAE_S3_PATIENCE", "0.5")
    with pytest.raises(paths.StorageError, match="bucket 'b'.*AWS_ENDPOINT_URL") as raised:
        paths.read_bytes("s3://b/k")
    assert "not-for-messages" not in str(raised.value)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(paths.StorageError, match="gs://"):
        paths.read_bytes("gs://bucket/key")


def test_links_that_leave_the_folder_are_not_listed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"x")
    (inside / "own.jpg").write_bytes(b"x")
    (inside / "link.jpg").symlink_to(outside / "secret.jpg")
    (inside / "loop").symlink_to(inside)
    (inside / "folder").symlink_to(outside)
    assert [f.uri for f in paths.list_files(str(inside))] == [str(inside / "own.jpg")]


def test_advice_on_a_local_file_does_not_depend_on_words_in_its_path(tmp_path):
    missing = tmp_path / "credentials/403 forbidden.json"
    with pytest.raises(paths.StorageError, match="it is not there") as error:
        paths.read_bytes(str(missing))
    assert "AWS" not in str(error.value)
