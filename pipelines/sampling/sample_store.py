"""Where the images of `fae sample` are kept: plan, shards, PNG folders, one NPZ, manifest.

A shard is a Parquet file of index, label and PNG, and of the prompt where there is one. Imports no
torch, because CPU tasks write here.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..config.sections import SampleSection
from ..runtime.packages import versions
from ..storage import StoreError, differences, paths, refuse_other_work

FORMAT = "fae-samples-1"
PLAN = "plan.json"


def claim(uri: str, parts: dict[str, Any]) -> None:
    """Write what decides the pictures, or raise StoreMismatch where something else is there."""
    try:
        paths.write_once(paths.join(uri, PLAN), json.dumps(parts, indent=1).encode())
        return
    except FileExistsError:
        differing = differences(claimed(uri), parts)
    refuse_other_work(f"{uri} holds other samples", differing, "Choose another output=….")


def claimed(uri: str) -> dict[str, Any]:
    """What decides the pictures that are drawn there already; empty for a new output."""
    plan_uri = paths.join(uri, PLAN)
    return dict(json.loads(paths.read_bytes(plan_uri))) if paths.exists(plan_uri) else {}


def missing_shards(uri: str, num_shards: int) -> list[int]:
    """Numbers of the shards that are not there."""
    sizes = _sizes(uri)
    return [index for index in range(num_shards) if _name(index) not in sizes]


def write_sample_shard(row: dict[str, Any], output: str, formats: Sequence[str]) -> dict[str, Any]:
    """Write one shard, and its PNG files where they are wanted; {shard, rows, drawn_at}."""
    images = [encode_png(image) for image in np.asarray(row["images"])]
    indices, labels = np.asarray(row["indices"]), np.asarray(row["labels"])
    prompts, num_prompts = json.loads(row.get("prompts", "[]")), int(row.get("num_prompts", 0))
    for place, (index, label) in enumerate(zip(indices.tolist(), labels.tolist(), strict=True)):
        files = {}
        if "png" in formats:
            folder = "png" if prompts else f"png/{label:04d}"
            files[f"{folder}/{index:08d}.png"] = images[place]
        if "geneval" in formats and prompts:
            number = index // num_prompts
            files |= _geneval_files(label, number, images[place], prompts[place])
        for name, data in files.items():
            paths.write_bytes(paths.join(output, name), data)
    columns = {
        "index": pa.array(indices, pa.int64()),
        "label": pa.array(labels, pa.int64()),
        "image": images,
    }
    if prompts:
        columns["prompt"] = pa.array([record["prompt"] for record in prompts], pa.string())
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", write_page_checksum=True)
    # After the PNG files: a shard that is there has all of its pictures.
    paths.write_bytes(paths.join(output, "shards", _name(int(row["shard"]))), buffer.getvalue())
    return {"shard": int(row["shard"]), "rows": len(images), "drawn_at": row["drawn_at"]}


def _geneval_files(
    label: int, number: int, png: bytes, record: Mapping[str, Any]
) -> dict[str, bytes]:
    """Files by name of image `number` of prompt `label`, as GenEval's evaluation reads them.

    GenEval's own prompts bring the metadata that it judges by.
    """
    folder = f"geneval/{label:05d}"
    files = {f"{folder}/samples/{number:04d}.png": png}
    if number == 0:
        files[f"{folder}/metadata.jsonl"] = json.dumps(record).encode()
    return files


def encode_png(image: np.ndarray) -> bytes:
    """The PNG of a uint8 image [S, S, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_samples(uri: str, num_shards: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images uint8 [n, S, S, 3], labels int64 [n]) of each shard, in order of index."""
    for shard in range(num_shards):
        data = paths.read_bytes(paths.join(uri, "shards", _name(shard)))
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        pngs = table["image"].cast(pa.binary()).to_pylist()
        images = [np.asarray(Image.open(io.BytesIO(png))) for png in pngs]
        yield np.stack(images), table["label"].to_numpy()


def commit_samples(
    output: str,
    sample: SampleSection,
    parts: dict[str, Any],
    num_shards: int,
    run: dict[str, Any],
    class_names: Sequence[str] = (),
    prompts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Check that every image is there, write samples.npz where it is wanted, then the manifest.

    `class_names` are the generator's, `prompts` the records of what was drawn, each in the order of
    their numbers. Returns the manifest.
    """
    manifest_uri = paths.join(output, "manifest.json")
    if paths.exists(manifest_uri):
        return dict(json.loads(paths.read_bytes(manifest_uri)))
    sizes, names = _sizes(output), [_name(index) for index in range(num_shards)]
    absent = sum(name not in sizes for name in names)
    if absent:
        raise StoreError(f"{output}: {absent} of {num_shards} shards are missing.")
    if "npz" in sample.formats:
        write_npz(output, num_shards, sample.num_images)
    manifest = {
        **parts,
        "class_names": list(class_names),
        **({"prompts": [record["prompt"] for record in prompts]} if prompts else {}),
        "stored": sample.num_images,
        "shards": [{"name": name, "bytes": sizes[name]} for name in names],
        "run": {**run, "versions": versions()},
    }
    paths.write_once(manifest_uri, json.dumps(manifest, indent=1).encode())
    return manifest


def write_npz(uri: str, num_shards: int, num_images: int) -> None:
    """samples.npz with arr_0 uint8 [n, S, S, 3], as ADM's evaluator reads it, in bounded memory."""
    shards = read_samples(uri, num_shards)
    first, _ = next(shards)
    shape = (num_images, *first.shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    filesystem, path = paths.filesystem(paths.join(uri, "samples.npz"))
    with (
        filesystem.open_output_stream(path) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        member.write(first.tobytes())
        for images, _ in shards:
            member.write(images.tobytes())


def _sizes(uri: str) -> dict[str, int]:
    """Bytes of the shards that are there, by name."""
    files = paths.list_files(paths.join(uri, "shards"))
    return {file.uri.rpartition("/")[2]: file.size for file in files}


def _name(shard: int) -> str:
    return f"{shard:08d}.parquet"
