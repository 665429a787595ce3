"""The CPU tasks of both precomputes: a shard's records to crops, an encoded shard to its files.

They import no torch: a process of such a task starts in one second instead of five, and holds some
110 MiB instead of 600. A node that decodes has one for every core or two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..config.sections import DataSection
from ..data.crops import ImageError, decode_records
from ..data.reading import RowStreams, load_crops, read_records
from ..runtime import metrics
from ..storage import StoreError
from .plan import Plan, PlanId, open_plan
from .shards import write_shard
from .token_states import STATES, TokenStates


@cache
def plan_of(expected: PlanId) -> Plan:
    """The plan of a store, opened once a process. StoreError where another one is there now."""
    plan = open_plan(expected.uri)
    if plan.id != expected:
        raise StoreError(
            f"{expected.uri} has another plan than this job began with: it was removed or replaced "
            "meanwhile, or this node has other files at the same path. Run the command again."
        )
    return plan


def is_readable(
    shard: int, keys: Sequence[str], plan_id: PlanId, data: DataSection, image_size: int
) -> bool:
    """Whether one of the shard's images `keys` can be read and decoded. Raises StorageError."""
    wanted = set(keys)
    records = [record for record in plan_of(plan_id).shard(shard) if record.key in wanted]
    _, places, _ = load_crops(records, image_size, data)
    return bool(places)


def read_shards(
    batch: dict[str, np.ndarray], plan_id: PlanId, data: DataSection
) -> Iterator[dict[str, Any]]:
    """{shards} -> for each {shard, content (all encoded bytes), lengths, lost (JSON)}, in order.

    The shards lie one after the other in a large row group of Parquet, which is read once for all.
    """
    plan = plan_of(plan_id)
    with RowStreams() as streams:
        for index in np.asarray(batch["shards"][0]).tolist():
            with metrics.stage("read"):
                blobs = read_records(plan.shard(index), data, streams)
            whole = [blob if isinstance(blob, bytes) else b"" for blob in blobs]
            lost = {i: str(b) for i, b in enumerate(blobs) if not isinstance(b, bytes)}
            metrics.count_bytes("read", sum(map(len, whole)))
            yield {
                "shard": [index],
                "content": [np.frombuffer(b"".join(whole), np.uint8)],
                "lengths": [np.array(list(map(len, whole)), np.int64)],
                "lost": [json.dumps(lost, ensure_ascii=False)],
            }


def decode_shard(
    row: dict[str, Any], plan_id: PlanId, data: DataSection, image_size: int
) -> dict[str, Any]:
    """{shard} -> {shard, images uint8 [n, S, S, 3], ok (places in the shard), errors (JSON)}.

    Reads the shard's images, unless the row comes from `read_shards` and has them.
    """
    records = plan_of(plan_id).shard(int(row["shard"]))
    if "content" in row:
        blobs = _blobs(row)
    else:
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


def _blobs(row: dict[str, Any]) -> list[bytes | Exception]:
    content = np.asarray(row["content"], np.uint8)
    ends = np.cumsum(np.asarray(row["lengths"], np.int64))
    lost = json.loads(str(row["lost"]))
    blobs: list[bytes | Exception] = []
    for index, end in enumerate(ends.tolist()):
        start = int(ends[index - 1]) if index else 0
        message = lost.get(str(index))
        blobs.append(content[start:end].tobytes() if message is None else ImageError(message))
    return blobs


def store_shard(row: dict[str, Any], plan_id: PlanId, columns: Sequence[str]) -> dict[str, Any]:
    """Write one encoded shard and its errors; {shard, rows, errors (JSON), encoded_at (s)}."""
    return _store(row, plan_id, {name: np.asarray(row[name]) for name in columns})


def store_states(row: dict[str, Any], plan_id: PlanId) -> dict[str, Any]:
    """Write one shard of token states and its errors; the result is as of `store_shard`."""
    values, empty = (np.asarray(row[name], np.float16) for name in (STATES, "empty"))
    return _store(row, plan_id, {STATES: TokenStates(values, json.loads(row["lengths"]), empty)})


def _store(
    row: dict[str, Any], plan_id: PlanId, latents: Mapping[str, np.ndarray | TokenStates]
) -> dict[str, Any]:
    plan, index = plan_of(plan_id), int(row["shard"])
    errors = json.loads(str(row["errors"]))
    with metrics.stage("write"):
        kept = [int(i) for i in row["ok"]]
        records = plan.shard(index)
        write_shard(
            plan.uri, index, records, kept, latents, errors, plan.fingerprint, plan.has_captions
        )
    metrics.count_bytes("written", sum(values.nbytes for values in latents.values()))
    metrics.count_shard(len(row["ok"]), errors)
    return {
        "shard": index,
        "rows": len(row["ok"]),
        "errors": json.dumps(errors),
        "encoded_at": row["encoded_at"],
    }
