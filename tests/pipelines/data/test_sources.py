"""Sources as people have them: what is planned of each, and the account of everything else."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fae.pipelines.config.sections import DataSection
from fae.pipelines.data import row_groups
from fae.pipelines.data.account import Account
from fae.pipelines.data.reading import load_crops, read_records
from fae.pipelines.data.records import SourceError, records_of
from fae.pipelines.data.sources import Source, list_images, plan_source
from fae.pipelines.latents.precompute_job import shards_in_large_groups, units_of
from fae.pipelines.storage import hub, paths
from tests.pictures import make_tar, put


def encoded(shade: int = 1, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 100, 50)).save(stream, kind)
    return stream.getvalue()


def plan(path: Path | str, **settings: object) -> Source:
    return plan_source(DataSection(path=str(path), **settings))


def labels(source: Source) -> list[int | None]:
    return source.table["label"].to_pylist()


def captions(source: Source) -> list[str | None]:
    return source.table["caption"].to_pylist()


def skipped(source: Source) -> dict[str, int]:
    """Skips by the first words of their reasons."""
    return {reason.split(" (")[0]: skip.count for reason, skip in source.account.skipped.items()}


# Folders


def test_every_listed_file_is_planned_or_skipped_with_a_reason(tmp_path):
    for name in ("a.jpg", "b.jfif", "c.jpe", "d.JPEG"):
        put(tmp_path / name, encoded())
    put(tmp_path / "e.avif", encoded(kind="AVIF"))
    put(tmp_path / "f.jp2", encoded(kind="JPEG2000"))
    put(tmp_path / "g", encoded())
    put(tmp_path / ".DS_Store", b"x")
    put(tmp_path / ".cache/h.jpg", encoded())
    put(tmp_path / "notes.txt", b"x")
    put(tmp_path / "i.heic", b"x")
    os.symlink(tmp_path / "gone.jpg", tmp_path / "j.jpg")
    source = plan(tmp_path)
    account = source.account
    assert account.num_images == 6 and account.num_files == 12
    assert account.num_files == account.num_images + account.num_skipped
    assert skipped(source) == {
        "hidden": 2,
        "HEIC, which Pillow does not read": 1,
        "no suffix": 1,
        "not an image by its name": 1,
        "broken link or special file": 1,
    }
    records = records_of(source.table)
    images, kept, errors = load_crops(records, 32, DataSection(path=str(tmp_path)))
    assert (len(images), kept, errors) == (6, [0, 1, 2, 3, 4, 5], [])
    with_all = plan(tmp_path, suffixes=[".jpg", ""])
    assert with_all.table["key"].to_pylist() == ["a.jpg", "g"]
    assert Account.from_dict(json.loads(json.dumps(account.to_dict()))) == account
    assert len(account.lines()) <= 10 and "12 listed = 6 read + 6 skipped" in account.lines()[1]


def test_an_image_beside_class_folders_is_counted_as_one_without_a_label(tmp_path):
    for label in range(2):
        for index in range(2):
            put(tmp_path / f"c{label}" / f"{index}.jpg", encoded())
    put(tmp_path / "preview.png", encoded(kind="PNG"))
    source = plan(tmp_path)
    assert labels(source) == [0, 0, 1, 1, None]
    account = source.account
    assert (account.num_labels, account.num_classes) == (4, 2)
    assert account.class_names == ["c0", "c1"] and account.labels_from == "class folders"
    assert "labels    4 of 5 images, 2 classes (c0 … c1)" in "\n".join(account.lines())


def test_splits_as_classes_are_seen_at_once(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / split / "cat" / "0.jpg", encoded())
    lines = "\n".join(plan(tmp_path).account.lines())
    assert "These are splits: give data.path=" in lines and "/train" in lines


def test_links_out_of_the_source_are_followed_left_out_or_asked_about(tmp_path):
    outside = tmp_path / "outside"
    for index in range(3):
        put(outside / f"{index}.jpg", encoded())
    root = tmp_path / "root"
    put(root / "a" / "x.jpg", encoded())
    os.symlink(outside, root / "b")
    os.symlink(outside / "1.jpg", root / "a" / "link.jpg")
    os.symlink(root, root / "a" / "loop")
    with pytest.raises(SourceError, match="2 links .* data.follow_links=true"):
        plan(root)
    followed = plan(root, follow_links=True)
    keys = ["a/link.jpg", "a/x.jpg", "b/0.jpg", "b/1.jpg", "b/2.jpg"]
    assert followed.table["key"].to_pylist() == keys
    assert labels(followed) == [0, 0, 1, 1, 1]
    data = DataSection(path=str(root), follow_links=True)
    assert all(isinstance(blob, bytes) for blob in read_records(list_images(data), data))
    left_out = plan(root, follow_links=False)
    assert left_out.table["key"].to_pylist() == ["a/x.jpg"]
    assert skipped(left_out) == {"link out of the source": 2}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_files_give_captions_and_labels_as_in_imagefolder(root, kind):
    rows = [
        {"file_name": "a.jpg", "text": "a cat", "label": "cat"},
        {"file_name": "deep/b.jpg", "text": "a dog", "label": "dog"},
        {"file_name": "gone.jpg", "text": "nothing", "label": "dog"},
    ]
    stream = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), stream)
    elif kind == "csv":
        lines = ["file_name,text,label", *(",".join(row.values()) for row in rows)]
        stream.write("\n".join(lines).encode())
    else:
        stream.write("\n".join(map(json.dumps, rows)).encode())
    paths.write_bytes(paths.join(root, f"x/set/metadata.{kind}"), stream.getvalue())
    for name in ("a.jpg", "deep/b.jpg", "c.jpg"):
        paths.write_bytes(paths.join(root, "x/set", name), encoded())
    source = plan(paths.join(root, "x"))
    assert captions(source) == ["a cat", None, "a dog"]
    assert labels(source) == [0, None, 1]
    account = source.account
    assert account.class_names == ["cat", "dog"]
    assert account.captions_from == f"metadata.{kind}, column text"
    assert account.unused == ["1 rows of metadata for files that are not there"]
    assert account.num_skipped == 0 and account.num_files == 4


def test_a_broken_line_of_metadata_costs_its_own_image_the_caption(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / name, encoded())
    lines = ['{"file_name": "a.jpg", "text": ["one", "two"]}', '{"file_name": "b.jpg", "te']
    put(tmp_path / "metadata.jsonl", "\n".join(lines))
    source = plan(tmp_path)
    assert captions(source) == ["one", None]
    assert source.table["captions"].to_pylist() == [["one", "two"], None]
    (loss,) = source.account.losses
    assert loss["address"].endswith("metadata.jsonl, line 2") and loss["stage"] == "plan"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_json_end_at_line_ends_and_nowhere_else(tmp_path, end):
    texts = ["plain", "two\u2028parts", "next\u0085line", "a\x7fb\u2029c"]
    for index in range(len(texts)):
        put(tmp_path / f"images/{index}.jpg", encoded())
    for name, column, folder in (("images/metadata", "file_name", ""), ("list", "uri", "images/")):
        rows = [{column: f"{folder}{i}.jpg", "text": text} for i, text in enumerate(texts)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        put(tmp_path / f"{name}.jsonl", end.join([*lines[:2], "", *lines[2:], ""]))
    for path in (tmp_path / "images", tmp_path / "list.jsonl"):
        source = plan(path)
        assert captions(source) == texts and source.account.num_losses == 0


def test_a_text_captions_all_images_of_its_name(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg", "b.txt.jpg"):
        put(tmp_path / name, encoded())
    put(tmp_path / "a.txt", "a cat")
    put(tmp_path / "b.txt", "a dog")
    source = plan(tmp_path)
    assert captions(source) == ["a cat", "a cat", "a dog", None]
    assert source.account.num_skipped == 0


def test_captions_are_read_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("fae.pipelines.data.sidecars.TEXTS_AT_ONCE", 4)
    for index in range(10):
        put(tmp_path / f"{index}.jpg", encoded())
        put(tmp_path / f"{index}.txt", f"caption {index}")
    assert captions(plan(tmp_path)) == [f"caption {index}" for index in range(10)]


def test_texts_beside_images_are_captions(root):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        paths.write_bytes(paths.join(root, name), encoded())
    paths.write_bytes(paths.join(root, "a.txt"), b"a cat\n")
    paths.write_bytes(paths.join(root, "b.txt"), "café".encode("latin-1"))
    paths.write_bytes(paths.join(root, "notes.txt"), b"x")
    source = plan(root)
    assert captions(source) == ["a cat", None, None]
    (loss,) = source.account.losses
    assert loss["address"].endswith("b.txt") and "UTF-8" in loss["message"]
    assert skipped(source) == {"not an image by its name": 1}
    without = plan(root, caption_column=None)
    assert captions(without) == [None] * 3 and skipped(without) == {"not an image by its name": 3}


# Parquet


def test_what_spark_left_behind_is_not_read(tmp_path):
    table = pa.table({"image": [encoded(1), encoded(2)], "label": [0, 1]})
    for folder in (tmp_path, tmp_path / "_temporary" / "0"):
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "part-0.parquet")
    put(tmp_path / "_SUCCESS", b"")
    source = plan(tmp_path)
    assert source.account.num_images == 2
    assert skipped(source) == {"part of a table format's bookkeeping": 2}


@pytest.mark.parametrize(
    ("log", "words"),
    [("_delta_log/00000000000000000000.json", "Delta"), ("metadata/v1.metadata.json", "Iceberg")],
)
def test_tables_whose_files_are_not_the_table_are_refused_in_words(tmp_path, log, words):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [encoded()]}), tmp_path / "data" / "0.parquet")
    put(tmp_path / log, b"{}")
    with pytest.raises(SourceError, match=f"{words} table.*Export it"):
        plan(tmp_path)


def test_captions_have_the_names_that_people_give_them(tmp_path):
    image = [{"bytes": encoded(), "path": None}]
    pq.write_table(pa.table({"image": image, "text": ["a cat"]}), tmp_path / "a.parquet")
    source = plan(tmp_path)
    assert captions(source) == ["a cat"] and source.account.captions_from == "column text"
    both = pa.table({"image": image, "text": ["x"], "prompt": ["y"], "width": [3]})
    pq.write_table(both, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="text and prompt could both hold the captions"):
        plan(tmp_path)
    chosen = plan(tmp_path, caption_column="prompt")
    assert captions(chosen) == ["y"] and chosen.account.unused == ["column text", "column width"]


def test_several_captions_in_a_cell_stay_a_list(tmp_path):
    table = pa.table({"image": [encoded()] * 3, "caption": [["a", "b"], ["c"], None]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = plan(tmp_path)
    assert captions(source) == ["a", "c", None]
    assert source.table["captions"].to_pylist() == [["a", "b"], None, None]


def test_class_names_are_numbered_in_their_order_and_kept(tmp_path):
    pq.write_table(
        pa.table({"image": [encoded()] * 3, "label": ["dog", "cat", None]}), tmp_path / "a.parquet"
    )
    source = plan(tmp_path)
    assert labels(source) == [1, 0, None] and source.account.class_names == ["cat", "dog"]


def test_names_of_hugging_faces_class_labels_are_kept(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [encoded()] * 2, "label": [1, 0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    source = plan(tmp_path)
    assert labels(source) == [1, 0] and source.account.class_names == ["cat", "dog"]


def test_hive_partitions_are_labels(tmp_path):
    for name in ("cat", "wild%20dog"):
        folder = tmp_path / f"label={name}"
        folder.mkdir()
        pq.write_table(pa.table({"image": [encoded()]}), folder / "0.parquet")
    source = plan(tmp_path)
    assert labels(source) == [0, 1] and source.account.class_names == ["cat", "wild dog"]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["aGVsbG8="], "is string"),
        ([[{"bytes": b"x"}]], "is list"),
        ([[1, 2, 3]], "is list"),
    ],
)
def test_a_column_without_encoded_images_is_refused_while_planning(tmp_path, cells, words):
    pq.write_table(pa.table({"image": cells, "jpg": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=f"column 'image' {words}.*jpg would fit"):
        plan(tmp_path)


def test_one_unreadable_parquet_file_costs_what_it_holds(tmp_path):
    pq.write_table(pa.table({"image": [encoded()]}), tmp_path / "a.parquet")
    put(tmp_path / "b.parquet", b"no parquet at all")
    source = plan(tmp_path)
    assert source.account.num_images == 1 and source.account.num_losses == 1
    assert source.account.losses[0]["address"].endswith("b.parquet")


@pytest.mark.parametrize("damage", ["a cut", "a changed footer", "nothing in it"])
def test_damaged_parquet_is_a_loss_however_arrow_calls_it(tmp_path, damage):
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [encoded()] * 9}), tmp_path / f"{name}.parquet")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 4] = b"\xff" * 4
    kept = {"a cut": content[:500], "a changed footer": content, "nothing in it": b""}[damage]
    (tmp_path / "b.parquet").write_bytes(kept)
    source = plan(tmp_path)
    assert source.account.num_images == 9 and source.account.num_losses == 1
    assert "b.parquet is not readable Parquet" in source.account.losses[0]["message"]
    assert source.account.lost_files == 1


def test_a_footer_of_any_length_is_read(tmp_path):
    table = pa.table({"image": [encoded()] * 3}).replace_schema_metadata({"note": "x" * 200_000})
    pq.write_table(table, tmp_path / "a.parquet")
    assert plan(tmp_path).account.num_images == 3


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError("AWS Error TIMEOUT")])
def test_a_network_that_fails_while_a_footer_is_read_is_no_loss_of_the_file(
    tmp_path, monkeypatch, error
):
    class Unreachable(io.FileIO):
        def read(self, size=-1):
            raise error

    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [encoded()]}), tmp_path / f"{name}.parquet")
    open_input = paths.open_input
    monkeypatch.setattr(
        paths,
        "open_input",
        lambda uri: pa.PythonFile(Unreachable(uri), "r") if "b." in uri else open_input(uri),
    )
    with pytest.raises(paths.StorageError, match=r"Cannot read .*b\.parquet"):
        plan(tmp_path)


def damage_a_label(path: Path, row: int, num_rows: int = 9) -> None:
    """Write Parquet with one label whose length reaches beyond its page; groups of three rows."""
    labels = [f"class {i:03d}" for i in range(num_rows)]
    table = pa.table({"image": [encoded()] * num_rows, "label": labels})
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    label = labels[row].encode()
    place = content.find(len(label).to_bytes(4, "little") + label)
    content[place : place + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)


def test_a_file_with_a_damaged_page_of_labels_is_a_loss_and_the_others_are_planned(tmp_path):
    damage_a_label(tmp_path / "a.parquet", 5)
    pq.write_table(pa.table({"image": [encoded()]}), tmp_path / "b.parquet")
    source = plan(tmp_path)
    assert source.table["key"].to_pylist() == ["b.parquet#00000000"]
    (loss,) = source.account.losses
    assert "a.parquet is not readable Parquet" in loss["message"]
    assert source.account.lost_files == 1


def test_rows_before_a_damaged_page_of_labels_are_planned_and_the_rest_is_a_share(tmp_path):
    damage_a_label(tmp_path / "a.parquet", 10_000, 10_002)
    source = plan(tmp_path)
    kept = source.account.num_images
    assert 0 < kept <= 10_000 and kept == source.account.num_labels
    (loss,) = source.account.losses
    assert f"({10_002 - kept} of its 10002 rows)" in loss["message"]
    assert source.account.lost_files == pytest.approx((10_002 - kept) / 10_002)


def test_damaged_labels_in_the_only_file_are_refused_by_its_name(tmp_path):
    damage_a_label(tmp_path / "a.parquet", 5)
    with pytest.raises(SourceError, match=r"a\.parquet is not readable Parquet"):
        plan(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_hub_that_goes_away_while_a_file_is_planned_is_said(tmp_path, monkeypatch, kind):
    class Away(io.FileIO):
        def read(self, size=-1):
            if self.tell() < 2000:
                raise hub._HTTP_ERROR("no route")
            return super().read(size)

    if kind == "tar":
        make_tar(tmp_path / "a.tar", [("0.jpg", encoded())])
    else:
        noise = os.urandom(100_000)
        table = pa.table({"label": [1], "image": [noise]})
        pq.write_table(table, tmp_path / "a.parquet", compression="none")
    address = f"hf://datasets/o/n/a.{kind}"
    found = paths.FileInfo(address, 1)
    monkeypatch.setattr(hub, "list_files", lambda uri, recursive: iter([found]))
    away = lambda uri: pa.PythonFile(Away(tmp_path / f"a.{kind}"), "r")  # noqa: E731
    monkeypatch.setattr(paths, "open_input", away)
    with pytest.raises(paths.StorageError, match="no connection .*Check the network"):
        plan("hf://datasets/o/n")


def test_a_large_row_group_is_read_once_for_all_who_ask_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("fae.pipelines.data.reading.LARGE_BYTES", 1000)
    monkeypatch.setattr("fae.pipelines.data.row_groups.STREAM_ROWS", 4)
    blobs = [b"%04d" % i * 50 for i in range(300)]
    cells = [{"bytes": blob, "path": None} for blob in blobs]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet", row_group_size=200)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    opened = []
    first_stream = row_groups._Stream.__init__

    def counted(stream, uri, group, column):
        opened.append(group)
        first_stream(stream, uri, group, column)

    monkeypatch.setattr(row_groups._Stream, "__init__", counted)
    with row_groups.RowStreams() as streams:
        for start in range(0, 300, 16):
            some = records[start : start + 16]
            assert read_records(some, data, streams) == blobs[start : start + 16]
        assert opened == [0, 1]
        assert read_records([records[250], records[7]], data, streams) == [blobs[250], blobs[7]]
    assert read_records(records[5:9], data) == blobs[5:9]


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """(path, blobs) of a Parquet file whose one row group is read as a stream."""
    monkeypatch.setattr("fae.pipelines.data.reading.LARGE_BYTES", 0)
    monkeypatch.setattr("fae.pipelines.data.row_groups.STREAM_ROWS", 16)
    blobs = [b"%06d" % index * 500 for index in range(300)]
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False}
    pq.write_table(
        pa.table({"image": blobs}), path, data_page_size=30_000, write_batch_size=10, **options
    )
    return path, blobs


def read_in_shards(path: Path, size: int) -> list[bytes | Exception]:
    data = DataSection(path=str(path))
    records = list_images(data)
    with row_groups.RowStreams() as streams:
        shards = [
            read_records(records[start : start + size], data, streams)
            for start in range(0, len(records), size)
        ]
    return [blob for shard in shards for blob in shard]


@pytest.mark.parametrize("row", [100, 119, 160])
def test_a_damaged_page_gives_no_row_the_bytes_of_another(streamed, monkeypatch, row):
    path, blobs = streamed
    content = bytearray(path.read_bytes())
    place = content.find(blobs[row])
    content[place - 4 : place] = b"\xff\xff\xff\x7f"  # the length of the row's bytes
    path.write_bytes(content)
    opened, open_input = [], paths.open_input
    monkeypatch.setattr(paths, "open_input", lambda uri: opened.append(uri) or open_input(uri))
    read = read_in_shards(path, 20)
    good = [index for index, blob in enumerate(read) if isinstance(blob, bytes)]
    assert [read[index] for index in good] == blobs[: len(good)]
    assert row - 26 < len(good) <= row  # a page and a batch around it
    assert all("not readable Parquet" in str(error) for error in read[len(good) :])
    num_shards, num_planning = 15, 3
    assert len(opened) <= num_planning + num_shards + 2  # each opens the footer; streams are few


def test_a_passing_read_error_costs_only_the_shard_that_met_it(streamed, monkeypatch):
    path, blobs = streamed
    num_reads = 0

    class Flaky(io.FileIO):
        def read(self, size=-1):
            nonlocal num_reads
            num_reads += 1
            if num_reads == 12:
                raise OSError(5, "Input/output error")
            return super().read(size)

    flaky = SimpleNamespace(open_input=lambda uri: pa.PythonFile(Flaky(uri), mode="r"))
    monkeypatch.setattr(row_groups, "paths", flaky)
    monkeypatch.setattr(row_groups, "BUFFER_BYTES", 1 << 16)
    read = read_in_shards(path, 20)
    lost = [index for index, blob in enumerate(read) if isinstance(blob, Exception)]
    assert lost and lost[-1] // 20 == lost[0] // 20
    assert all(read[index] == blobs[index] for index in range(300) if index not in lost)


def test_shards_of_one_large_row_group_are_one_unit_of_work(tmp_path, monkeypatch):
    monkeypatch.setattr("fae.pipelines.data.tables.LARGE_BYTES", 5000)
    blobs = [encoded() + bytes([index]) for index in range(60)]
    pq.write_table(pa.table({"image": blobs}), tmp_path / "a.parquet", row_group_size=40)
    pq.write_table(pa.table({"image": blobs[:1]}), tmp_path / "b.parquet")
    source = plan(tmp_path)
    assert source.large_groups == {f"{tmp_path}/a.parquet": {0: (0, 40), 1: (40, 60)}}
    streamed = shards_in_large_groups(source.table["uri"], source.large_groups, 8)
    units = units_of([0, 1, 3, 4, 5, 6, 7], streamed)
    assert units == [[0, 1, 3, 4], [5, 6, 7]]


# WebDataset


def test_a_bad_sidecar_costs_its_own_sample_the_caption(tmp_path):
    members = [
        ("000.jpg", encoded()), ("000.txt", "café".encode("latin-1")),
        ("001.jpg", encoded()), ("001.txt", b"fine"),
        ("002.jpg", encoded()), ("002.json", b'{"caption": "x",'),
        ("003.jpg", encoded()), ("003.json", b'{"caption": "good", "label": 4}'),
    ]  # fmt: skip
    source = plan(make_tar(tmp_path / "0.tar", members))
    assert captions(source) == [None, "fine", None, "good"]
    assert labels(source) == [None, None, None, 4]
    lost = [
        (loss["address"].partition("0.tar")[2], loss["message"]) for loss in source.account.losses
    ]
    assert [where for where, _ in lost] == [", member 000.txt", ", member 002.json"]
    assert "UTF-8" in lost[0][1] and "JSON" in lost[1][1]


def test_a_name_that_is_not_unicode_costs_its_own_member(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    source = plan(make_tar(tmp_path / "0.tar", [(name, encoded()), ("b.jpg", encoded())]))
    assert source.table["key"].to_pylist() == ["0.tar/b"]
    assert "not valid Unicode" in source.account.losses[0]["message"]


def test_a_tar_that_is_cut_short_gives_the_images_before_the_cut(tmp_path):
    members = [(f"{index}.jpg", encoded()) for index in range(4)]
    whole = make_tar(tmp_path / "whole.tar", members)
    second = next(i for i, r in enumerate(list_images(DataSection(path=str(whole)))) if i == 2)
    start = int(
        list_images(DataSection(path=str(whole)))[second].uri.partition("offset=")[2].split("&")[0]
    )
    (tmp_path / "cut").mkdir()
    path = put(tmp_path / "cut" / "0.tar", whole.read_bytes()[: start + 100])
    source = plan(path)
    assert source.table["key"].to_pylist() == ["0.tar/0", "0.tar/1"]
    assert source.account.num_losses >= 1
    assert "0.tar" in source.account.losses[0]["address"]


@pytest.mark.parametrize(
    ("damage", "message", "share"),
    [
        ("a header", "6144 of 10240 bytes are left): no header of a member at byte 4096", 0.6),
        ("zeros", "6144 of 10240 bytes are left): an end-of-archive block at byte 4096", 0.6),
        ("joined", "10240 of 18432 bytes are left): an end-of-archive block at byte 8192", 5 / 9),
        ("cut in a header", "100 of 4196 bytes are left): no header of a member", 100 / 4196),
        ("cut in padding", "its end: unexpected end of data", 0),
        ("long zeros", "2097152 of 2101248 bytes are left): an end-of-archive block", 512 / 513),
    ],
)
def test_a_tar_that_stops_before_its_end_is_a_loss_that_names_the_byte(
    tmp_path, damage, message, share
):
    whole = make_tar(tmp_path / "w.tar", [(f"{i}.jpg", b"x" * 500) for i in range(8)]).read_bytes()
    assert len(whole) == 10240 and plan(tmp_path / "w.tar").account.num_losses == 0
    damaged = {
        "a header": whole[:4200] + b"?" + whole[4201:],
        "zeros": whole[:4096] + bytes(512) + whole[4608:],
        "joined": whole[: 8192 + 1024] + whole[1024:],
        "cut in a header": whole[:4196],
        "cut in padding": whole[: 4096 - 5],
        "long zeros": whole[:4096] + bytes(2**21),
    }[damage]
    source = plan(put(tmp_path / "0.tar", damaged))
    assert source.account.num_images == (8 if damage == "joined" else 4)
    (loss,) = source.account.losses
    assert loss["address"].endswith("0.tar") and message in loss["message"]
    assert source.account.lost_files == pytest.approx(share)


def test_tars_that_their_writer_did_not_close_are_a_remark_and_no_loss(tmp_path):
    for name in "ab":
        path = make_tar(tmp_path / f"{name}.tar", [(f"{i}.jpg", b"x" * 500) for i in range(8)])
        path.write_bytes(path.read_bytes()[:8192])
    make_tar(tmp_path / "c.tar", [("0.jpg", b"x")])
    account = plan(tmp_path).account
    assert (account.num_images, account.num_losses, account.lost_files) == (17, 0, 0)
    (line,) = (line for line in account.lines() if line.startswith("remark"))
    assert "2 of 3 tars end without an end-of-archive block, for example" in line
    assert "a.tar" in line


@pytest.mark.parametrize("zeros", [512, 1024, 2**20])
def test_every_padding_that_writers_of_tars_use_is_an_end(tmp_path, zeros):
    whole = make_tar(tmp_path / "w.tar", [("a.jpg", b"x" * 500)]).read_bytes()
    source = plan(put(tmp_path / "0.tar", whole[:1024] + bytes(zeros)))
    assert (source.account.num_images, source.account.num_losses) == (1, 0)


def test_a_network_that_fails_within_a_tar_is_no_loss_of_its_rest(tmp_path, monkeypatch):
    class Unreachable(io.FileIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    path = make_tar(tmp_path / "0.tar", [("a.jpg", b"x" * 500)])
    monkeypatch.setattr(paths, "open_input", lambda uri: pa.PythonFile(Unreachable(uri), "r"))
    with pytest.raises(paths.StorageError, match=r"Cannot read .*0\.tar"):
        plan(path)


def test_the_member_that_is_the_image_is_chosen_by_a_setting(tmp_path):
    members = [
        (f"{index:03d}.{part}", encoded(kind=kind))
        for index in range(2)
        for part, kind in (("jpg", "JPEG"), ("mask.png", "PNG"))
    ]
    path = make_tar(tmp_path / "0.tar", members)
    with pytest.raises(SourceError, match="several images: jpg, mask.png. Set data.members"):
        plan(path)
    source = plan(path, members="jpg")
    assert source.table["key"].to_pylist() == ["0.tar/000", "0.tar/001"]
    assert source.account.unused == ["members .mask.png (data.members=jpg)"]
    masks = plan(path, members="mask.png")
    assert masks.table["key"].to_pylist() == ["0.tar/000", "0.tar/001"]


# Lists


def test_labels_that_pandas_wrote_as_floats_are_integers(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        put(tmp_path / "i" / name, encoded())
    path = put(tmp_path / "list.csv", "uri,label\ni/1.jpg,3.0\ni/2.jpg,\n")
    assert labels(plan(path)) == [3, None]
    assert skipped(plan(tmp_path)) == {"a table or a list": 1}


def test_a_csv_field_that_is_too_long_is_named_with_its_line(tmp_path):
    long = "x" * 140_000
    path = put(tmp_path / "list.csv", f"uri,text\na.jpg,short\nb.jpg,{long}\n")
    with pytest.raises(SourceError, match=r"list.csv, line 3: field larger than .*quotation mark"):
        plan(path)
    with pytest.raises(SourceError, match=r"line 1: field larger"):
        plan(put(tmp_path / "head.csv", f"uri,{long}\n"))
    put(tmp_path / "images/a.jpg", encoded())
    put(tmp_path / "images/metadata.csv", f"file_name,text\na.jpg,{long}\n")
    source = plan(tmp_path / "images")
    assert captions(source) == [None]
    assert "field larger than" in source.account.losses[0]["message"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_lists_are_read_by_their_kind_and_file_addresses_are_decoded(tmp_path, kind):
    image = put(tmp_path / "a b.jpg", encoded())
    address = f"file://{tmp_path}/a%20b.jpg"
    separator = "\t" if kind == "tsv" else ","
    text = f"uri{separator}text\n{address}{separator}a cat\n"
    if kind == "jsonl":
        text = json.dumps({"uri": address, "text": "a cat"}) + "\n"
    data = DataSection(path=str(put(tmp_path / f"list.{kind}", text)))
    (record,) = list_images(data)
    assert (record.uri, record.caption) == (str(image), "a cat")
    assert read_records([record], data) == [image.read_bytes()]
