"""The CPU tasks of precompute: a shard's records to crops, and an encoded shard to its files.

They import no torch: a process of such a task starts in one second instead of five, and holds some
110 MiB instead of 600. A node that decodes has one for every core or two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..config.sections import DataSection
from ..data.crops import decode_records
from ..data.reading import read_records
from ..runtime import metrics
from .plan import Plan, open_plan
from .shards import write_shard


@cache
def plan_of(output: str) -> Plan:
    """The plan of a store, opened once a process."""
    return open_plan(output)


def decode_shard(
    row: dict[str, Any], output: str, data: DataSection, image_size: int
) -> dict[str, Any]:
    """{shard} -> {shard, images uint8 [n, S, S, 3], ok (places in the shard), errors (JSON)}."""
    records = plan_of(output).shard(int(row["shard"]))
    with metrics.stage("read"):
        blobs = read_records(records, data)
    metrics.count_bytes("read", sum(len(blob) for blob in blobs if isinstance(blob, bytes)))
    with metrics.stage("decode"):
        images, ok, errors = decode_records(records, blobs, image_size, data)
    return {
        "shard": int(row["shard"]),
        "images": images,
        "ok": np.asarray(ok, dtype=np.int64),
        "errors": json.dumps(errors, ensure_ascii=False),
    }


def store_shard(row: dict[str, Any], output: str, columns: Sequence[str]) -> dict[str, Any]:
    """Write one encoded shard and its errors; {shard, rows, errors (JSON), encoded_at (s)}."""
    plan, index = plan_of(output), int(row["shard"])
    errors = json.loads(str(row["errors"]))
    latents: dict[str, np.ndarray] = {name: np.asarray(row[name]) for name in columns}
    with metrics.stage("write"):
        kept = [int(i) for i in row["ok"]]
        records = plan.shard(index)
        write_shard(
            output, index, records, kept, latents, errors, plan.fingerprint, plan.has_captions
        )
    metrics.count_bytes("written", sum(values.nbytes for values in latents.values()))
    metrics.count_shard(len(row["ok"]), errors)
    return {
        "shard": index,
        "rows": len(row["ok"]),
        "errors": json.dumps(errors),
        "encoded_at": row["encoded_at"],
    }
