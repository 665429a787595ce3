"""What Ray Data's tasks on CPUs run: records to crops, and encoded shards to files.

Without torch: a process of such a task starts in one second instead of five, and holds some 110 MiB instead of 600. A node that
decodes has one for every core or two.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np

from pipelines import latent_store, metrics
from pipelines.config import DataSection, Recipe
from pipelines.image_sets import read_crops
from pipelines.images import decode_records, read_records
from pipelines.latent_store import Plan, open_plan
from pipelines.sources import ImageRecord


@cache
def plan_of(output: str) -> Plan:
    """The plan of a store, opened once a process."""
    return open_plan(output)


def decode_shard(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """{shard} -> {shard, images uint8 [n,S,S,3], ok (positions in the plan's shard), errors (JSON)}."""
    assert recipe.output is not None
    records = plan_of(recipe.output).shard(int(row["shard"]))
    with metrics.stage("read"):
        blobs = read_records(records, recipe.data)
    metrics.count_bytes("read", sum(len(blob) for blob in blobs if isinstance(blob, bytes)))
    with metrics.stage("decode"):
        images, ok, errors = decode_records(records, blobs, recipe.image_size, recipe.data)
    return {
        "shard": int(row["shard"]),
        "images": images,
        "ok": np.asarray(ok, dtype=np.int64),
        "errors": json.dumps(errors, ensure_ascii=False),
    }


def write_shard(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Write one encoded shard and its errors; returns {shard, rows, errors (JSON), encoded_at (s)}."""
    assert recipe.output is not None
    plan, index = plan_of(recipe.output), int(row["shard"])
    errors = json.loads(str(row["errors"]))
    latents: dict[str, np.ndarray] = {
        name: np.asarray(row[name]) for name in recipe.precompute.columns
    }
    with metrics.stage("write"):
        latent_store.write_shard(
            recipe.output,
            index,
            plan.shard(index),
            [int(i) for i in row["ok"]],
            latents,
            errors,
            plan.fingerprint,
        )
    metrics.count_bytes("written", sum(values.nbytes for values in latents.values()))
    metrics.count_shard(len(row["ok"]), errors)
    return {
        "shard": index,
        "rows": len(row["ok"]),
        "errors": json.dumps(errors),
        "encoded_at": row["encoded_at"],
    }


class DecodeBatch:
    """Ray Data's map function: records of one micro-batch to its crops, one row to one row."""

    def __init__(self, data: DataSection, size: int) -> None:
        self.data = data
        self.size = size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        records = [ImageRecord(key, uri) for key, uri in json.loads(row["records"])]
        blobs = read_records(records, self.data)
        images, kept, errors = decode_records(records, blobs, self.size, self.data)
        if not kept:  # a tensor of no images has no place in a block
            images = np.zeros((1, self.size, self.size, 3), np.uint8)
        notes = json.dumps({"kept": [int(index) for index in kept], "errors": errors})
        return {"images": images, "notes": notes}


def decode_batch(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """{records, paired} -> {images uint8 [n,S,S,3], keys, pairs (positions in `images`), errors}, the last three JSON."""
    records = [ImageRecord(*values) for values in json.loads(str(row["records"]))]
    blobs = read_records(records, recipe.data)
    images, ok, errors = decode_records(records, blobs, recipe.image_size, recipe.data)
    place = {index: position for position, index in enumerate(ok)}
    firsts = range(0, len(records), 2) if bool(row["paired"]) else ()
    pairs = [(place[i], place[i + 1]) for i in firsts if i in place and i + 1 in place]
    return {
        "images": images,
        "keys": json.dumps([records[i].key for i in ok]),
        "pairs": json.dumps(pairs),
        "errors": json.dumps(errors),
    }


def decode_chunk(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """{images, originals?} (pieces of work) -> crops of them, positions in the chunk, errors; of pairs, both or none."""
    images, kept, errors = read_crops(json.loads(row["images"]), recipe)
    decoded = {"chunk": row["chunk"], "start": row["start"]}
    if "originals" in row:
        originals, whole, more = read_crops(json.loads(row["originals"]), recipe)
        both = sorted(set(kept) & set(whole))
        decoded["originals"] = originals[[whole.index(i) for i in both]]
        images, kept, errors = images[[kept.index(i) for i in both]], both, errors + more
    return {
        **decoded,
        "images": images,
        "kept": np.asarray(kept, dtype=np.int64),
        "errors": json.dumps(errors, ensure_ascii=False),
    }
