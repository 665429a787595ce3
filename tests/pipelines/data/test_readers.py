"""Every kind of source gives its records and bytes, and every bad input its outcome.

What S3 gives equals what a folder gives.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.crops import (
    ImageError,
    decode_records,
)
from fae.pipelines.data.reading import read_records
from fae.pipelines.data.records import ImageRecord, SourceError
from fae.pipelines.data.sources import list_images
from fae.pipelines.storage import paths
from tests.pictures import encode, make_tar, noise, put

SIZE = 32
LIMIT = 1_000_000


def plan(path: Path | str, **fields: Any) -> list[ImageRecord]:
    return list_images(DataSection(path=str(path), **fields))


def test_every_record_ends_as_a_crop_or_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encode(noise(40, 50)))
    put(tmp_path / "b.jpg", b"")
    put(tmp_path / "c.jpg", b"text")
    put(tmp_path / "d.png", encode(noise(50, 40)))
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    (tmp_path / "d.png").unlink()
    images, kept, errors = decode_records(records, read_records(records, data), SIZE, data)
    assert images.shape == (1, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert kept == [0]
    stages = [(error["key"], error["stage"]) for error in errors]
    assert stages == [("b.jpg", "decode"), ("c.jpg", "decode"), ("d.png", "read")]
    again = decode_records(records, read_records(records, data), SIZE, data)[2]
    assert again == errors


def test_no_good_image_gives_an_empty_batch() -> None:
    images, kept, errors = decode_records([ImageRecord("k", "u")], [b""], SIZE, DataSection())
    assert (images.shape, kept, len(errors)) == ((0, SIZE, SIZE, 3), [], 1)


# Folders


def test_class_folders_give_labels_in_name_order(tmp_path: Path) -> None:
    for name in (
        "dog/1.JPG",
        "cat/deep/2.png",
        "cat/naïve cat 猫.webp",
        ".hidden/3.png",
        "dog/.4.png",
    ):
        put(tmp_path / name, b"x")
    put(tmp_path / "notes.txt", b"x")
    assert [(r.key, r.label) for r in plan(tmp_path)] == [
        ("cat/deep/2.png", 0),
        ("cat/naïve cat 猫.webp", 0),
        ("dog/1.JPG", 1),
    ]


def test_an_image_beside_class_folders_has_no_label_and_the_others_keep_theirs(
    tmp_path: Path,
) -> None:
    put(tmp_path / "a b é.jpg", b"one")
    put(tmp_path / "folder/c.jpg", b"two")
    records = plan(tmp_path)
    assert [r.label for r in records] == [None, 0]
    assert [r.label for r in plan(tmp_path, label_column=None)] == [None, None]
    assert read_records(records, DataSection()) == [b"one", b"two"]


def test_limit_takes_the_first_in_key_order(tmp_path: Path) -> None:
    for name in ("c.jpg", "a.jpg", "b.jpg"):
        put(tmp_path / name, b"x")
    assert [r.key for r in plan(tmp_path, limit=2)] == ["a.jpg", "b.jpg"]


def test_a_source_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        plan(tmp_path / "none")
    with pytest.raises(SourceError, match="holds no files"):
        plan(tmp_path)
    with pytest.raises(SourceError, match="data.path is not set"):
        list_images(DataSection())


def test_two_kinds_in_one_folder_ask_for_a_format(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", b"x")
    make_tar(tmp_path / "b.tar", [("c.jpg", b"x")])
    with pytest.raises(SourceError, match="Set data.format"):
        plan(tmp_path)
    assert [r.key for r in plan(tmp_path, format="webdataset")] == ["b.tar/c"]


# Parquet


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_rows_have_keys_in_row_order_and_give_their_bytes(
    tmp_path: Path, nested: bool
) -> None:
    blobs = [f"image {i}".encode() for i in range(12)]
    cells: list[Any] = [{"bytes": b, "path": None} for b in blobs] if nested else list(blobs)
    cells[5] = None
    table = pa.table({"image": cells, "label": [*range(11), None], "caption": ["é"] * 12})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    assert [r.key for r in records] == [f"x.parquet#{i:08d}" for i in range(12)]
    assert records[11].uri == f"{tmp_path}/x.parquet#row=11"
    assert ([r.label for r in records], records[0].caption) == ([*range(11), None], "é")
    order = [11, 0, 5, 7]
    read = read_records([records[i] for i in order], data)
    assert [read[0], read[1], read[3]] == [blobs[11], blobs[0], blobs[7]]
    assert isinstance(read[2], ImageError)


def test_a_struct_without_bytes_reads_the_path_beside_its_file(tmp_path: Path) -> None:
    put(tmp_path / "files/a.jpg", b"beside")
    cells = [{"bytes": None, "path": "files/a.jpg"}, {"bytes": None, "path": "../../etc/passwd"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "x.parquet")
    data = DataSection(path=str(tmp_path / "x.parquet"))
    first, second = read_records(list_images(data), data)
    assert first == b"beside"
    assert isinstance(second, SourceError)


def test_parquet_planning_names_wrong_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "klass": [1]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="'imag'.*image_column.*Did you mean 'image'"):
        plan(tmp_path, image_column="imag")
    with pytest.raises(SourceError, match="key_column"):
        plan(tmp_path, key_column="id")
    with pytest.raises(SourceError, match="label_column.*klass"):
        plan(tmp_path, label_column="class")
    assert plan(tmp_path, label_column="klass")[0].label == 1


def test_the_same_key_twice_is_refused_with_both_addresses(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"image": [b"x"], "id": ["same"]}), tmp_path / name)
    with pytest.raises(SourceError, match=r"'same'.*a\.parquet#row=0.*b\.parquet#row=0"):
        plan(tmp_path, key_column="id")


def test_rows_and_files_that_vanish_fail_alone(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"image": [b"0", b"1"]}), tmp_path / name)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    pq.write_table(pa.table({"image": [b"0"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").unlink()
    read = read_records(records, data)
    assert read[0] == b"0"
    assert "row 1 is gone" in str(read[1])
    assert all(isinstance(item, paths.StorageError) and "404" in str(item) for item in read[2:])


def test_a_machine_without_file_descriptors_is_no_error_of_its_images(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encode(noise(4, 5)))
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(paths.StorageError, match="Too many open files"):
            read_records(records, data)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What reading fails with, by the end of the file's name; every file for an empty one."""
    errors: dict[str, int] = {}

    def check(path: str) -> None:
        for name, code in errors.items():
            if path.endswith(name):
                raise OSError(code, os.strerror(code))

    read_bytes, open_input = Path.read_bytes, fs.LocalFileSystem.open_input_file

    class Local(fs.LocalFileSystem):
        def open_input_file(self, path: str) -> pa.NativeFile:
            check(path)
            return open_input(self, path)

    def read(path: Path) -> bytes:
        check(str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(fs, "LocalFileSystem", Local)
    return errors


@pytest.mark.parametrize("code", ["EACCES", "EPERM", "EIO", "EUCLEAN", "EBADMSG", "EINVAL"])
def test_a_mount_that_refuses_all_ends_the_job_and_one_file_is_its_own_error(
    tmp_path: Path, denied: dict[str, int], code: str
) -> None:
    for index in range(4):
        put(tmp_path / f"{index}.png", b"%d" % index)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    denied["2.png"] = getattr(errno, code)
    for some in (records, records[2:3]):  # also alone in its shard or batch
        lost = [blob for blob in read_records(some, data) if not isinstance(blob, bytes)]
        assert len(lost) == 1 and "2.png" in str(lost[0])
    denied[""] = getattr(errno, code)
    for some in (records, records[:1]):
        with pytest.raises(paths.StorageError, match=r"0\.png"):
            read_records(some, data)


def test_a_mount_that_goes_away_within_a_shard_gives_no_errors(
    tmp_path: Path, denied: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        put(tmp_path / f"{index}.png", b"%d" % index)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    read = paths.read_bytes

    def until_the_second(uri: str) -> bytes:
        if uri.endswith("2.png"):
            denied[""] = errno.EIO
        return read(uri)

    monkeypatch.setattr(paths, "read_bytes", until_the_second)
    with pytest.raises(paths.StorageError, match=r"2\.png: Input/output error"):
        read_records(records, data)


@pytest.mark.parametrize("kind", ["csv", "tar", "parquet"])
def test_a_refused_file_of_any_source_is_told_from_a_source_that_is_refused(
    tmp_path: Path, denied: dict[str, int], kind: str
) -> None:
    source = tmp_path / "source"
    for name in "ab":
        if kind == "csv":
            put(tmp_path / name / "0.png", b"0")
        elif kind == "tar":
            make_tar(source.joinpath(f"{name}.tar"), [("0.jpg", b"0")])
        else:
            source.mkdir(exist_ok=True)
            pq.write_table(pa.table({"image": [b"0"]}), source / f"{name}.parquet")
    if kind == "csv":
        rows = [[str(tmp_path / name / "0.png")] for name in "ab"]
        source = write_csv(tmp_path / "list.csv", [["uri"], *rows])
    data = DataSection(path=str(source))
    records = list_images(data)
    denied["b/0.png" if kind == "csv" else f"b.{kind}"] = errno.EACCES
    (lost,) = read_records(records[1:], data)
    assert isinstance(lost, paths.RefusedError)
    denied["a/0.png" if kind == "csv" else f"a.{kind}"] = errno.EACCES
    with pytest.raises(paths.RefusedError, match="Permission denied"):
        read_records(records[1:], data)


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "x.parquet", b"no parquet at all")
    with pytest.raises(SourceError, match=r"x\.parquet is not readable Parquet"):
        plan(tmp_path)


# WebDataset


def test_tar_members_are_grouped_by_name_and_read_by_range(tmp_path: Path) -> None:
    members = {
        "d/one.jpg": b"first",
        "d/one.cls": b"7\n",
        "d/one.txt": b"a caption\n",
        "two.json": json.dumps({"label": 3, "caption": "from json"}).encode(),
        "two.PNG": b"second",
        "../three.webp": b"third",
        "four.txt": b"no image",
        "._two.png": b"hidden",
    }
    make_tar(tmp_path / "s.tar", members.items())
    data = DataSection(path=str(tmp_path / "s.tar"))
    records = list_images(data)
    assert [(r.key, r.label, r.caption) for r in records] == [
        ("s.tar/../three", None, None),
        ("s.tar/d/one", 7, "a caption"),
        ("s.tar/two", 3, "from json"),
    ]
    assert read_records(records, data) == [b"third", b"first", b"second"]


def test_tar_shards_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "gz/a.tar.gz", b"x")
    with pytest.raises(SourceError, match="compressed tar"):
        plan(tmp_path / "gz")
    put(tmp_path / "text/a.tar", b"x" * 2000)
    with pytest.raises(SourceError, match="not a readable WebDataset shard"):
        plan(tmp_path / "text")
    make_tar(
        tmp_path / "c.tar", [("a.jpg", b"x"), ("a.cls", b"dog"), ("b.jpg", b"x"), ("b.cls", b"1")]
    )
    with pytest.raises(SourceError, match="numbers .* and some are names \\('dog'\\)"):
        plan(tmp_path / "c.tar")
    make_tar(tmp_path / "d.tar", [("a.jpg", b"x"), ("a.left.jpg", b"y")])
    with pytest.raises(SourceError, match="jpg, left.jpg. Set data.members"):
        plan(tmp_path / "d.tar")


def test_a_tar_cut_after_planning_gives_errors_of_its_records(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s.tar", [("a.jpg", b"a" * 600), ("b.jpg", b"b" * 600)])
    data = DataSection(path=str(path))
    records = list_images(data)
    path.write_bytes(path.read_bytes()[:2200])
    first, second = read_records(records, data)
    assert first == b"a" * 600
    assert isinstance(second, ImageError)


# Lists


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_csv_list_resolves_addresses_against_its_folder(tmp_path: Path) -> None:
    put(tmp_path / "in/a b.jpg", b"relative")
    other = put(tmp_path / "other/é.jpg", b"absolute")
    rows = [
        ["uri", "label", "caption"],
        ["./a b.jpg", "4", 'says "hi", twice'],
        [str(other), "", ""],
    ]
    data = DataSection(path=str(write_csv(tmp_path / "in/list.csv", rows)))
    records = list_images(data)
    assert {(r.key, r.label, r.caption) for r in records} == {
        ("./a b.jpg", 4, 'says "hi", twice'),
        (str(other), None, None),
    }
    assert read_records(records, data) == [b"relative", b"absolute"]


def test_a_parquet_list_is_recognized_and_takes_its_key_column(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", b"content")
    pq.write_table(pa.table({"uri": ["a.jpg"], "id": [17]}), tmp_path / "list.parquet")
    data = DataSection(path=str(tmp_path / "list.parquet"), key_column="id")
    records = list_images(data)
    assert records == [ImageRecord("17", str(tmp_path / "a.jpg"))]
    assert read_records(records, data) == [b"content"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["uri"], ["x/../../secret.jpg"]], "leaves"),
        ([["uri"], ["https://example.org/a.jpg"]], "neither a path nor s3"),
        ([["url"], ["a.jpg"]], "uri_column.*Did you mean 'url'"),
        ([["uri", "label"], ["a.jpg", "dog"], ["b.jpg", "1"]], "numbers .* names \\('dog'\\)"),
        ([["uri", "label"], ["", "1"]], "no value in column 'uri'"),
        ([["uri"], ["a.jpg"], ["a.jpg"]], "'a.jpg' occurs twice"),
        ([["uri"]], "no images"),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        plan(write_csv(tmp_path / "list.csv", rows))


# S3 gives what a local folder gives; `root` runs each test on both


def test_a_tree_reads_alike_locally_and_on_s3(root: str) -> None:
    for name in ("cat/a b é.jpg", "dog/c.png"):
        paths.write_bytes(paths.join(root, "tree", name), name.encode())
    data = DataSection(path=paths.join(root, "tree"))
    records = list_images(data)
    assert [(r.key, r.label) for r in records] == [("cat/a b é.jpg", 0), ("dog/c.png", 1)]
    vanished = ImageRecord("gone", paths.join(root, "tree/gone.jpg"))
    first, second, third = read_records([*records, vanished], data)
    assert (first, second) == ("cat/a b é.jpg".encode(), b"dog/c.png")
    assert isinstance(third, paths.StorageError)


def test_shards_and_lists_read_alike_locally_and_on_s3(root: str, tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "made.tar", [("a.cls", b"1"), ("a.jpg", b"aa"), ("b/c.jpg", b"cc")])
    pq.write_table(pa.table({"image": [b"0", b"1"]}), tmp_path / "made.pq")
    paths.write_bytes(paths.join(root, "wds/s.tar"), shard.read_bytes())
    paths.write_bytes(paths.join(root, "pq/x.parquet"), (tmp_path / "made.pq").read_bytes())
    paths.write_bytes(paths.join(root, "tree/c.jpg"), b"listed")
    paths.write_bytes(paths.join(root, "tree/list.csv"), b"uri,label\nc.jpg,5\n")
    expected = {"wds": [b"aa", b"cc"], "pq": [b"0", b"1"], "tree/list.csv": [b"listed"]}
    for path, blobs in expected.items():
        data = DataSection(path=paths.join(root, path))
        assert read_records(list_images(data), data) == blobs


def test_images_imports_without_ray() -> None:
    modules = "fae.pipelines.data.crops, fae.pipelines.data.reading"
    code = f"import sys, {modules}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tasks_that_decode_and_write_start_without_torch():
    """Each of a node's decoding processes would hold 400 MiB more, and start four seconds later."""
    rooms = ("latents.tasks", "evaluation.tasks", "data.decoding", "sampling.sample_store")
    modules = ", ".join(f"fae.pipelines.{name}" for name in rooms)
    code = f"import sys, {modules}; print({{'torch', 'timm', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
