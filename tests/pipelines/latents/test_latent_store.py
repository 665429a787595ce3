"""The latent store without Ray: plan, shards, manifest, verification, and the readers."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae.pipelines.config.sections import PrecomputeSection
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents import shards
from fae.pipelines.latents.filling import shards_to_run
from fae.pipelines.latents.manifest import commit, missing_shards
from fae.pipelines.latents.plan import Plan, ensure_plan, open_plan
from fae.pipelines.latents.reader import NO_LABEL, LatentBatch, LatentStore
from fae.pipelines.latents.shards import files_in, read_errors, write_shard
from fae.pipelines.latents.tasks import plan_of, store_shard
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.storage import objects, paths
from fae.pipelines.storage.claims import StoreError, StoreMismatch

SHAPE = (3, 4, 4)
PARTS = {"backbone": "b", "autoencoder weights": "w", "columns": "mean"}


def records(count: int) -> list[ImageRecord]:
    return [
        ImageRecord(
            f"k{i:04d} ü", f"/x/{i}", None if i % 5 == 0 else i % 7, None if i % 2 else "a cat"
        )
        for i in range(count)
    ]


def latents_of(rows: list[ImageRecord]) -> np.ndarray:
    return np.stack(
        [
            np.random.default_rng(int(r.key[1:5])).normal(2, 3, SHAPE).astype(np.float16)
            for r in rows
        ]
        or [np.empty(SHAPE)]
    )[: len(rows)].astype(np.float16)


def write(uri: str, plan: Plan, index: int, lost: tuple[int, ...] = ()) -> None:
    rows = plan.shard(index)
    kept = [i for i in range(len(rows)) if i not in lost]
    errors = [{"key": rows[i].key, "stage": "decode", "message": "damaged"} for i in lost]
    values = {"mean": latents_of([rows[i] for i in kept])}
    write_shard(uri, index, rows, kept, values, errors, plan.fingerprint)


def build(uri: str, count: int = 25, size: int = 8, lost: tuple[int, ...] = (2, 5)) -> LatentStore:
    plan = ensure_plan(uri, records(count), size, PARTS)
    for index in range(plan.num_shards):
        write(uri, plan, index, lost if index == 1 else ())
    commit(uri, plan, {"seconds": 1.0})
    return LatentStore.open(uri)


def encoded(plan: Plan) -> dict[str, object]:
    """What an actor gives of shard 0."""
    row = {"shard": 0, "errors": "[]", "ok": range(plan.shard_rows(0)), "encoded_at": 0.0}
    return {**row, "mean": latents_of(plan.shard(0))}


def test_a_plan_gives_every_image_one_shard(tmp_path):
    plan = ensure_plan(str(tmp_path), records(25), 8, PARTS)
    assert (plan.num_images, plan.num_shards) == (25, 4)
    assert (
        [len(plan.shard(i)) for i in range(4)]
        == [8, 8, 8, 1]
        == [plan.shard_rows(i) for i in range(4)]
    )
    assert [r for i in range(4) for r in plan.shard(i)] == records(25)
    again = ensure_plan(str(tmp_path), records(25), 8, PARTS)
    assert again.fingerprint == plan.fingerprint
    table = pq.read_table(tmp_path / "plan.parquet")
    assert table.column_names == ["shard", "key", "uri", "label", "caption"]


def test_a_plan_of_many_shards_puts_several_into_a_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("fae.pipelines.latents.plan.PLAN_GROUPS", 3)
    plan = ensure_plan(str(tmp_path), records(77), 8, PARTS)
    assert pq.ParquetFile(tmp_path / "plan.parquet").num_row_groups == 3
    assert (plan.num_images, plan.num_shards) == (77, 10)
    assert [r for i in range(10) for r in plan.shard(i)] == records(77)
    assert [len(plan.shard(i)) for i in range(10)] == [plan.shard_rows(i) for i in range(10)]
    shards = pq.read_table(tmp_path / "plan.parquet")["shard"].to_pylist()
    assert shards == [i // 8 for i in range(77)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {**PARTS, "autoencoder weights": "v"}}, "autoencoder weights: w there, v now"),
        ({"parts": {**PARTS, "crop": "c"}}, "crop: nothing there, c now"),
        ({"size": 4}, "shard size: 8 there, 4 now"),
        ({"records": records(26)}, r"1 images more than planned, the first 'k0025 ü'"),
        (
            {"records": [ImageRecord("k0000 ü", "/elsewhere", None, "a cat"), *records(25)[1:]]},
            "another address",
        ),
    ],
)
def test_another_plan_on_the_same_output_is_refused_with_the_part(tmp_path, change, message):
    ensure_plan(str(tmp_path), records(25), 8, PARTS)
    before = (tmp_path / "plan.parquet").read_bytes()
    with pytest.raises(StoreMismatch, match=message):
        ensure_plan(
            str(tmp_path),
            change.get("records", records(25)),
            change.get("size", 8),
            change.get("parts", PARTS),
        )
    assert (tmp_path / "plan.parquet").read_bytes() == before


def test_a_process_of_an_earlier_job_works_on_the_plan_of_the_later_one(tmp_path):
    uri = str(tmp_path / "store")
    first = ensure_plan(uri, records(8), 8, PARTS)
    assert plan_of(first.id).shard(0) == records(8)
    shutil.rmtree(uri)
    relabelled = [dataclasses.replace(r, label=9) for r in records(8)]
    second = ensure_plan(uri, relabelled, 8, PARTS)
    store_shard(encoded(second), second.id, ["mean"])
    commit(uri, second, {})
    assert next(LatentStore.open(uri).reader(8, seed=0)).labels.tolist() == [9] * 8


def test_a_task_of_a_job_whose_plan_was_replaced_writes_nothing(tmp_path):
    uri = str(tmp_path / "store")
    first = ensure_plan(uri, records(8), 8, PARTS)
    row = encoded(first)
    shutil.rmtree(uri)
    ensure_plan(uri, records(9), 8, PARTS)
    with pytest.raises(StoreError, match="another plan than this job began with"):
        store_shard(row, first.id, ["mean"])
    assert not (tmp_path / "store" / "shards").exists()


def test_images_that_vanished_after_planning_do_not_stop_a_resumption(tmp_path):
    ensure_plan(str(tmp_path), records(25), 8, PARTS)
    plan = ensure_plan(str(tmp_path), records(25)[:20], 8, PARTS)
    assert plan.num_images == 25


def test_missing_shards_are_those_without_a_file(root):
    uri = paths.join(root, "store")
    plan = ensure_plan(uri, records(25), 8, PARTS)
    assert missing_shards(uri, plan) == [0, 1, 2, 3]
    write(uri, plan, 2)
    assert missing_shards(uri, plan) == [0, 1, 3]
    with pytest.raises(StoreError, match="3 of 4 shards are missing, the first 0"):
        commit(uri, plan, {})


def test_a_store_round_trips_locally_and_on_s3(root, tmp_path):
    store = build(paths.join(root, "store"))
    assert verify_store(store.uri) == []
    manifest = store.manifest
    assert (manifest["planned"], manifest["stored"], manifest["errors"]) == (25, 23, 2)
    assert store.latent_shape == SHAPE and store.columns == ["mean"] and len(store) == 23
    shard = store.read_shard(1)
    rows = [r for i, r in enumerate(records(25)[8:16]) if i not in (2, 5)]
    assert shard["key"] == [r.key for r in rows]
    assert shard["label"] == [r.label for r in rows]
    assert shard["caption"] == [r.caption for r in rows]
    assert np.array_equal(shard["mean"], latents_of(rows))
    errors = list(read_errors(store.uri))
    assert [e["key"] for e in errors] == ["k0010 ü", "k0013 ü"]
    every = np.concatenate([store.read_shard(i)["mean"] for i in range(4)]).astype(np.float64)
    np.testing.assert_allclose(store.stats.mean, every.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(store.stats.std, every.std((0, 2, 3)), rtol=1e-12)
    for cache in (None, str(tmp_path / "cache")):
        first = next(store.reader(23, seed=1, cache=cache))
        assert np.array_equal(every[first.rows].astype(np.float16), first.latents["mean"])
    # Only shards from S3 are copied, and only where a cache is asked for.
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == (4 if "s3://" in root else 0)


def test_a_shard_is_plain_parquet_whose_rows_are_ranges(tmp_path):
    store = build(str(tmp_path))
    entry = store.manifest["shards"][1]
    path = tmp_path / "shards" / entry["name"]
    table = pq.read_table(path)  # pyarrow alone, no Ray in sight
    assert table.schema.field("mean").type == pa.fixed_shape_tensor(pa.float16(), SHAPE)
    values = table["mean"].combine_chunks().to_numpy_ndarray()
    size = int(np.prod(SHAPE)) * 2
    data = path.read_bytes()
    for row in range(entry["rows"]):
        start = entry["offsets"]["mean"] + row * size
        assert data[start : start + size] == values[row].tobytes()


def test_writing_again_gives_the_same_bytes_and_removes_stale_errors(tmp_path):
    uri = str(tmp_path)
    plan = ensure_plan(uri, records(8), 8, PARTS)
    write(uri, plan, 0)
    whole = (tmp_path / "shards" / "00000000.parquet").read_bytes()
    write(uri, plan, 0, lost=(3,))
    assert (tmp_path / "errors" / "00000000.parquet").exists()
    write(uri, plan, 0)
    assert (tmp_path / "shards" / "00000000.parquet").read_bytes() == whole
    assert list(read_errors(uri)) == []


@pytest.mark.parametrize("kept", [[0, 1], [0, 1, 2, 2], [0, 1, 2, 3]])
def test_a_shard_that_loses_or_repeats_an_image_is_not_written(tmp_path, kept):
    plan = ensure_plan(str(tmp_path), records(4), 4, PARTS)
    rows = plan.shard(0)
    errors = [{"key": rows[3].key, "stage": "read", "message": "gone"}]
    values = {"mean": latents_of([rows[i] for i in kept])}
    with pytest.raises(ValueError, match="do not name each once"):
        write_shard(str(tmp_path), 0, rows, kept, values, errors, plan.fingerprint)
    assert not (tmp_path / "shards").exists()


def test_a_store_of_only_errors_is_finished_too(tmp_path):
    plan = ensure_plan(str(tmp_path), records(3), 2, PARTS)
    write(str(tmp_path), plan, 0, lost=(0, 1))
    write(str(tmp_path), plan, 1, lost=(0,))
    manifest = commit(str(tmp_path), plan, {})
    assert (manifest["stored"], manifest["errors"]) == (0, 3)
    assert verify_store(str(tmp_path)) == []


def test_a_commit_in_parts_is_the_commit_in_one(tmp_path, monkeypatch):
    whole = build(str(tmp_path / "one"), lost=(2, 5)).manifest
    for module in ("manifest", "shards"):
        monkeypatch.setattr(f"fae.pipelines.latents.{module}.SHARDS_AT_ONCE", 1)
    parts = build(str(tmp_path / "parts"), lost=(2, 5)).manifest
    assert parts == whole


def test_committing_again_changes_nothing_but_a_changed_store_is_refused(tmp_path):
    store = build(str(tmp_path))
    plan = open_plan(str(tmp_path))
    before = (tmp_path / "manifest.json").read_bytes()
    assert commit(str(tmp_path), plan, {"seconds": 9.0}) == store.manifest
    assert (tmp_path / "manifest.json").read_bytes() == before
    write(str(tmp_path), plan, 0, lost=(0,))
    with pytest.raises(StoreMismatch, match="stored, errors, statistics, shards"):
        commit(str(tmp_path), plan, {})


def damage_truncate(folder: Path) -> None:
    path = folder / "shards" / "00000001.parquet"
    os.truncate(path, path.stat().st_size - 7)


def damage_flip(folder: Path, place: float) -> None:
    path = folder / "shards" / "00000001.parquet"
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def damage_words(folder: Path, **changed: object) -> None:
    """Shard 2 with a changed record, in a manifest that says so."""
    (folder / "manifest.json").unlink()
    plan = open_plan(str(folder))
    rows = plan.shard(2)
    rows[1] = dataclasses.replace(rows[1], **changed)
    values = {"mean": latents_of(rows)}
    write_shard(str(folder), 2, rows, range(8), values, [], plan.fingerprint)
    commit(str(folder), plan, {})


def damage_swap(folder: Path) -> None:
    first, second = (folder / "shards" / f"0000000{i}.parquet" for i in (0, 2))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "00000001.parquet has .* bytes, the manifest says"),
        (lambda f: (f / "shards" / "00000003.parquet").unlink(), "00000003.parquet is missing"),
        (
            lambda f: (f / "shards" / "00000009.parquet").write_bytes(b"x"),
            "00000009.parquet is not in the manifest",
        ),
        (
            lambda f: (f / "shards" / "00000000 (copy).parquet").write_bytes(b"x"),
            r"00000000 \(copy\).parquet is not in the manifest",
        ),
        (damage_swap, "00000000.parquet has"),
        (lambda f: damage_words(f, label=9), "00000002.parquet has another label or caption of"),
        (
            lambda f: damage_words(f, caption="x"),
            "00000002.parquet has another label or caption of",
        ),
        (
            lambda f: (f / "errors" / "00000001.parquet").unlink(),
            "00000001.parquet has 6 rows and 0 errors",
        ),
        (lambda f: (f / "manifest.json").unlink(), "not finished: 4 of 4 shards"),
    ],
)
def test_verify_names_the_damage(tmp_path, damage, message):
    store = build(str(tmp_path))
    damage(tmp_path)
    problems = verify_store(store.uri)
    assert len(problems) >= 1
    import re

    assert any(re.search(message, problem) for problem in problems), problems


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1))
def test_verify_finds_any_flipped_byte(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("flip")
    build(str(folder), count=12, size=6, lost=())
    damage_flip(folder, place)
    problems = verify_store(str(folder))
    assert len(problems) == 1 and problems[0].startswith(
        "shards/00000001.parquet has the right size"
    )


def in_footer(data: bytes) -> int:
    """A place in a shard that no checksum of a page covers."""
    return data.rindex(b"parquet-cpp")


def rot(monkeypatch: pytest.MonkeyPatch, place: Callable[[bytes], int]) -> None:
    """From now on S3 gives shard 2 with a flipped bit, and the ETag as it was."""
    sound = objects.read_bytes

    def read_bytes(address):
        data = bytearray(sound(address))
        if address.endswith("shards/00000002.parquet"):
            data[place(data)] ^= 1
        return bytes(data)

    monkeypatch.setattr(objects, "read_bytes", read_bytes)


@pytest.mark.parametrize("root", ["s3"], indirect=True)
@pytest.mark.parametrize("copied_in_parts", [False, True])
def test_bytes_that_rot_under_an_etag_are_found(root, monkeypatch, copied_in_parts):
    uri = build(paths.join(root, "store")).uri
    if copied_in_parts:  # an ETag with a dash, while the manifest has the MD5
        client, shard = boto3.client("s3"), f"{uri}/shards/00000002.parquet"
        body = paths.read_bytes(shard)
        asked = {"Bucket": "bucket", "Key": shard.removeprefix("s3://bucket/")}
        asked["UploadId"] = client.create_multipart_upload(**asked)["UploadId"]
        part = client.upload_part(**asked, PartNumber=1, Body=body)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        client.complete_multipart_upload(**asked, MultipartUpload=parts)
    assert verify_store(uri) == []
    rot(monkeypatch, in_footer)
    (problem,) = verify_store(uri)
    assert problem.startswith("shards/00000002.parquet has the right size and other bytes")


def test_a_copy_on_the_hub_is_verified_by_the_manifests_md5s(hub, tmp_path):
    build(str(tmp_path))
    files = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    hub.add("datasets/me/latents", files)
    assert verify_store("hf://datasets/me/latents") == []
    data = bytearray(files["shards/00000002.parquet"])
    data[in_footer(data)] ^= 1
    hub.add("datasets/me/latents", {**files, "shards/00000002.parquet": bytes(data)})
    (problem,) = verify_store("hf://datasets/me/latents")
    assert problem.startswith("shards/00000002.parquet has the right size and other bytes")


@pytest.fixture
def encrypted(root, monkeypatch):
    """A store on S3 whose ETags are no MD5, with SSE-KMS; and a function that renews one."""
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}
    client = boto3.client("s3")
    client.put_bucket_encryption(
        Bucket="bucket", ServerSideEncryptionConfiguration={"Rules": [rule]}
    )
    renewed = set()
    real = objects._etag

    def etag(answer):
        mark = "renewed" if answer.get("Key", "").rpartition("/")[2] in renewed else "first"
        return hashlib.md5(f"{mark}{real(answer)}".encode()).hexdigest()

    monkeypatch.setattr(objects, "_etag", etag)
    store = build(paths.join(root, "store"))
    yield store.uri, renewed.add
    client.delete_bucket_encryption(Bucket="bucket")


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_an_etag_that_is_no_md5_is_no_damage(encrypted, monkeypatch):
    uri, _ = encrypted
    assert verify_store(uri) == []
    rot(monkeypatch, lambda data: len(data) // 3)
    (problem,) = verify_store(uri)
    assert problem.startswith("shards/00000002.parquet is not readable")


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_a_shard_that_is_encoded_again_with_another_etag_is_committed(encrypted):
    uri, renew = encrypted
    plan = open_plan(uri)
    renew("00000002.parquet")
    assert missing_shards(uri, plan) == [2]
    write(uri, plan, 2)
    assert commit(uri, plan, {}) == LatentStore.open(uri).manifest
    assert missing_shards(uri, plan) == [] and verify_store(uri) == []


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_a_commit_does_not_undo_what_another_driver_renewed_meanwhile(encrypted, monkeypatch):
    uri, renew = encrypted
    plan, replace = open_plan(uri), paths.replace
    renew("00000002.parquet")
    write(uri, plan, 2)

    def after_another(*arguments):
        monkeypatch.setattr(paths, "replace", replace)
        renew("00000001.parquet")
        write(uri, plan, 1, lost=(2, 5))
        commit(uri, plan, {})
        return replace(*arguments)

    monkeypatch.setattr(paths, "replace", after_another)
    with pytest.raises(StoreMismatch, match="differs in: shards"):
        commit(uri, plan, {})
    assert missing_shards(uri, plan) == [] and verify_store(uri) == []


def test_a_damaged_shard_counts_as_missing_once_its_size_betrays_it(tmp_path):
    build(str(tmp_path))
    plan = open_plan(str(tmp_path))
    damage_truncate(tmp_path)
    assert missing_shards(str(tmp_path), plan) == [1]
    write(str(tmp_path), plan, 1, lost=(2, 5))
    assert verify_store(str(tmp_path)) == []


SECTION = PrecomputeSection(max_error_rate=0.01)


@pytest.fixture
def failed(tmp_path, without_ray):
    """The plan of an unfinished store of three shards, each with an image that failed."""
    plan = ensure_plan(str(tmp_path), records(24), 8, PARTS)
    for index in range(plan.num_shards):
        write(str(tmp_path), plan, index, lost=(2,))
    return plan


def test_only_shards_with_an_image_that_is_readable_now_are_done_anew(failed, capsys):
    key = failed.shard(1)[2].key
    assert shards_to_run(failed, SECTION, lambda shard, keys: False) == []
    assert len(files_in(failed.uri, "shards")) == len(files_in(failed.uri, "errors")) == 3
    assert "done anew" not in capsys.readouterr().err
    assert shards_to_run(failed, SECTION, lambda shard, keys: keys == [key]) == [1]
    assert "1 shards with images that are readable now are done anew" in capsys.readouterr().err
    assert missing_shards(failed.uri, failed) == [1]


def test_a_few_shards_with_errors_are_not_even_read(failed, monkeypatch):
    monkeypatch.setattr("fae.pipelines.latents.shards.read_shard_errors", None)
    rate = PrecomputeSection(max_error_rate=1.0)
    assert shards_to_run(failed, rate, lambda shard, keys: True) == []


def test_a_shard_that_another_driver_does_anew_is_left_to_it(failed):
    def meanwhile(shard, keys):
        if shard == 0:
            for name in ("shards", "errors"):
                paths.delete(paths.join(failed.uri, name, "00000001.parquet"))
            write(failed.uri, failed, 2, lost=(2, 3))
        return True

    assert shards_to_run(failed, SECTION, meanwhile) == [0, 1]
    assert len(list(read_errors(failed.uri))) == 2


def test_errors_that_another_driver_deletes_are_none(failed, monkeypatch):
    read = shards.read_shard_errors

    def meanwhile(uri):
        paths.delete(paths.join(failed.uri, "errors", "00000001.parquet"))
        return read(uri)

    monkeypatch.setattr(shards, "read_shard_errors", meanwhile)
    assert shards_to_run(failed, SECTION, lambda shard, keys: shard == 1) == []


def test_a_store_that_another_driver_finishes_keeps_its_shards(failed):
    def meanwhile(shard, keys):
        if shard == 2:
            for index in range(3):
                write(failed.uri, failed, index)
            commit(failed.uri, failed, {})
        return True

    assert shards_to_run(failed, SECTION, meanwhile) == []
    assert verify_store(failed.uri) == []


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_temporary_files_of_a_killed_writer_are_no_part_of_the_store(tmp_path, part):
    plan = ensure_plan(str(tmp_path), records(24), 8, PARTS)
    for index in range(plan.num_shards):
        write(str(tmp_path), plan, index, (2, 5))
        for folder in ("errors", "shards"):
            file = tmp_path / folder / f"{index:08d}.parquet"
            data = file.read_bytes()
            left = file.with_name(f".{file.name}.{index:032x}.tmp")
            left.write_bytes(data[: int(part * len(data))])
    assert missing_shards(str(tmp_path), plan) == []
    assert len(list(read_errors(str(tmp_path)))) == 6
    assert commit(str(tmp_path), plan, {})["errors"] == 6
    assert verify_store(str(tmp_path)) == []


def test_a_manifest_with_other_statistics_is_found(tmp_path):
    build(str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["statistics"]["mean"]["sums"][0] = "17"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert verify_store(str(tmp_path)) == ["the manifest's statistics of mean are not the latents'"]


def test_opening_what_is_no_store_says_what_it_is(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        LatentStore.open(str(tmp_path))
    ensure_plan(str(tmp_path), records(3), 2, PARTS)
    with pytest.raises(StoreError, match="has not finished; run the same command again"):
        LatentStore.open(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="not of format"):
        LatentStore.open(str(tmp_path))


def test_the_reader_draws_one_of_several_captions_by_seed_epoch_and_row(tmp_path):
    captions = {"0": ("a", "b", "c"), "1": ("only",), "2": (), "3": ("d", "e")}
    images = [
        ImageRecord(key, f"/x/{key}", None, (*texts, None)[0], texts if len(texts) > 1 else None)
        for key, texts in captions.items()
    ]
    plan = ensure_plan(str(tmp_path), images, 3, PARTS)
    for shard in range(plan.num_shards):
        rows = plan.shard(shard)
        values = {"mean": np.zeros((len(rows), *SHAPE), np.float16)}
        kept = list(range(len(rows)))
        write_shard(str(tmp_path), shard, rows, kept, values, [], plan.fingerprint, True)
    commit(str(tmp_path), plan, {})
    store = LatentStore.open(str(tmp_path))
    assert next(store.reader(2, seed=0)).captions is None
    batches = list(islice(store.reader(2, seed=0, captions=True), 40))

    def drawn(some: list[LatentBatch]) -> dict[int, dict[int, str | None]]:
        """Captions by row and epoch."""
        found: dict[int, dict[int, str | None]] = {row: {} for row in range(4)}
        for batch in some:
            for row, epoch, text in zip(batch.rows, batch.epochs, batch.captions, strict=True):
                found[int(row)][int(epoch)] = text
        return found

    seen = drawn(batches)
    assert {row: set(texts.values()) for row, texts in seen.items()} == {
        int(key): set(texts or (None,)) for key, texts in captions.items()
    }
    # Neither workers nor a later start change what is drawn.
    for step in (3, 17):
        halves = [
            next(store.reader(2, 0, rank, 2, start_step=step, captions=True)) for rank in (0, 1)
        ]
        assert [text for half in halves for text in half.captions] == batches[step].captions
    assert drawn(list(islice(store.reader(2, seed=1, captions=True), 40)))[0] != seen[0]


def test_the_reader_gives_each_row_once_an_epoch_and_the_same_to_any_workers(tmp_path):
    store = build(str(tmp_path), count=26, size=8, lost=(2, 5))  # 24 rows
    whole = list(islice(store.reader(6, seed=4), 8))
    for epoch in range(2):
        rows = np.concatenate([b.rows for b in whole[epoch * 4 : epoch * 4 + 4]])
        assert sorted(rows) == list(range(24))
    every = np.concatenate([store.read_shard(i)["mean"] for i in range(store.num_shards)])
    labels = [label for i in range(store.num_shards) for label in store.read_shard(i)["label"]]
    for step, batch in enumerate(whole):
        assert np.array_equal(batch.latents["mean"], every[batch.rows])
        assert list(batch.labels) == [
            NO_LABEL if labels[i] is None else labels[i] for i in batch.rows
        ]
        halves = [
            next(store.reader(6, seed=4, rank=r, world_size=2, start_step=step)) for r in (0, 1)
        ]
        assert np.array_equal(np.concatenate([h.rows for h in halves]), batch.rows)
        assert np.array_equal(
            np.concatenate([h.latents["mean"] for h in halves]), batch.latents["mean"]
        )


def test_the_reader_refuses_what_it_cannot_give(tmp_path):
    store = build(str(tmp_path))
    with pytest.raises(StoreError, match="stores mean; not logvar"):
        store.reader(2, seed=0, columns=["mean", "logvar"])
    with pytest.raises(ValueError, match="does not divide"):
        store.reader(3, seed=0, world_size=2)
    os.truncate(tmp_path / "shards" / "00000000.parquet", 100)
    with pytest.raises(StoreError, match="not what the manifest says"):
        next(store.reader(22, seed=0))
