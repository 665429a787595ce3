"""What Ray Data's tasks on CPUs run: records to crops, and encoded shards to files.

Without torch: a process of such a task starts in one second instead of five, and holds some 110 MiB instead of 600. A node that
decodes has one for every core or two.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np

from ..config import Recipe
from ..data.crops import decode_records
from ..data.reading import read_records
from ..runtime import metrics
from . import shards
from .plan import Plan, open_plan


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
        shards.write_shard(
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
