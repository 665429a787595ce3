"""A store of latents or token states read again, every byte, against its manifest and plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fae_core.latent_stats import ChannelStats

from ..data.records import ImageRecord
from ..storage import paths
from .manifest import missing_shards, read_manifest
from .plan import open_plan
from .shards import (
    LATENT_COLUMNS,
    WORD_COLUMNS,
    captions_of,
    files_in,
    read_shard_errors,
    tensor_values,
)
from .token_states import STATES, TOKENS, starts_of


def verify_store(uri: str, on_shard: Callable[[int, int], None] | None = None) -> list[str]:
    """Re-read every shard against manifest and plan; the problems in words, none if it is sound.

    Finds a missing, truncated, changed, swapped or extra shard, a flipped byte anywhere in it (of
    an object with SSE-KMS or SSE-C: in its pages, by their checksums), an image that is in two
    places or in none, a label or caption that is not the plan's, and statistics that are not the
    latents'. `on_shard(done, of)` is called after each shard.
    """
    plan = open_plan(uri)
    manifest = read_manifest(uri, plan.format)
    if manifest is None:
        done = plan.num_shards - len(missing_shards(uri, plan))
        return [f"not finished: {done} of {plan.num_shards} shards, no manifest.json"]
    problems = []
    if plan.fingerprint != manifest["fingerprint"] or plan.source != manifest["source"]:
        problems.append("plan.parquet is not the plan that the manifest was made from")
    errors: dict[str, set[str]] = {}
    for name, file in files_in(uri, "errors").items():
        try:
            errors[name] = {row["key"] for row in read_shard_errors(file.uri)}
        except (pa.ArrowException, KeyError, OSError) as error:
            problems.append(f"errors/{name} is not readable: {error}")
    there = files_in(uri, "shards")
    names = {entry["name"] for entry in manifest["shards"]}
    problems += [f"shards/{name} is not in the manifest" for name in sorted(there.keys() - names)]
    problems += [f"errors/{name} has no shard" for name in sorted(errors.keys() - names)]
    totals: dict[str, ChannelStats] = {}
    for done, (index, entry) in enumerate(enumerate(manifest["shards"]), 1):
        planned = {r.key: r for r in plan.shard(index)} if index < plan.num_shards else {}
        lost = errors.get(entry["name"], set())
        shard = there.get(entry["name"])
        found = _verify_shard(shard, entry, planned, lost, totals) if shard else ["is missing"]
        problems += [f"shards/{entry['name']} {problem}" for problem in found]
        if on_shard:
            on_shard(done, len(manifest["shards"]))
    if not problems:
        for name, stats in totals.items():
            recorded = manifest["statistics"][name]
            if stats.to_dict() != {key: recorded[key] for key in ("count", "sums", "squares")}:
                problems.append(f"the manifest's statistics of {name} are not the latents'")
        counted = sum(e["rows"] for e in manifest["shards"]), sum(map(len, errors.values()))
        if (
            counted != (manifest["stored"], manifest["errors"])
            or sum(counted) != manifest["planned"]
        ):
            problems.append("the manifest's totals are not the shards'")
    return problems


def _verify_shard(
    file: paths.FileInfo,
    entry: Mapping[str, Any],
    planned: Mapping[str, ImageRecord],
    lost: set[str],
    totals: dict[str, ChannelStats],
) -> list[str]:
    data = paths.read_bytes(file.uri)
    if len(data) != entry["bytes"]:
        return [f"has {len(data)} bytes, the manifest says {entry['bytes']}"]
    content = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if content != entry["etag"] and _is_md5(entry["etag"], file):
        return ["has the right size and other bytes than when it was written"]
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        return [f"is not readable: {error}"]
    keys = table["key"].cast(WORD_COLUMNS["key"]).to_pylist()
    problems = []
    if len(keys) != entry["rows"] or len(lost) != entry["errors"]:
        problems.append(
            f"has {len(keys)} rows and {len(lost)} errors, the manifest says "
            f"{entry['rows']} and {entry['errors']}"
        )
    if len(set(keys)) != len(keys) or set(keys) & lost or set(keys) | lost != planned.keys():
        problems.append("and its errors do not name each planned image once")
    labels = table["label"].cast(WORD_COLUMNS["label"]).to_pylist()
    words = zip(labels, captions_of(table), strict=True)
    for key, (label, captions) in zip(keys, words, strict=True):
        record = planned.get(key)
        if record and (label, captions) != (record.label, _planned_captions(record)):
            problems.append(f"has another label or caption of {key!r} than the plan")
            break
    for name in table.column_names:
        if name in LATENT_COLUMNS:
            values = tensor_values(table[name])
            stats = totals.setdefault(name, ChannelStats.empty(values.shape[1]))
            stats.update(np.moveaxis(values, 1, -1))
    if STATES in table.column_names:
        problems += _verify_states(table, entry["tokens"])
    return problems


def _is_md5(etag: str, file: paths.FileInfo) -> bool:
    """Whether the manifest's `etag`, which is not the MD5 of the file's bytes now, was one.

    Only S3 makes others: of an object that was written in parts, or encrypted with a KMS or
    customer key. The pages' checksums remain there.
    """
    return "-" not in etag and not (file.etag == etag and paths.is_encrypted(file.uri))


def _planned_captions(record: ImageRecord) -> tuple[str, ...]:
    return record.captions or (() if record.caption is None else (record.caption,))


def _verify_states(table: pa.Table, num_tokens: int) -> list[str]:
    captions, starts = starts_of(table[TOKENS])
    counted = np.diff(starts[captions])
    of_rows = table[STATES].combine_chunks().value_lengths().to_numpy()
    said = np.array([len(several) for several in captions_of(table)])
    if not np.array_equal(np.diff(captions), said):
        return ["has not a number of tokens for each caption"]
    if not np.array_equal(counted, of_rows) or starts[-1] != num_tokens:
        return ["has not as many states as tokens"]
    return []
