"""manifest.json of a latent store: what is missing, and the commit that writes it, last.

It is written once. Only its ETags are renewed, where shards of a finished store on S3 were written
again with SSE-KMS or SSE-C: there the same bytes have another ETag whenever they are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fae_core.latent_stats import ChannelStats

from ..runtime.packages import versions
from ..storage import StoreError, StoreMismatch, paths
from .plan import FORMAT, PLAN, TEXT_FORMAT, Plan
from .shards import (
    LATENT_COLUMNS,
    SHARDS_AT_ONCE,
    THREADS,
    Each,
    files_in,
    read_errors,
    value_offsets,
)
from .token_states import STATES, state_width


def missing_shards(uri: str, plan: Plan) -> list[int]:
    """Shards that are not there, or not as the manifest (where there is one) recorded them."""
    there = files_in(uri, "shards")
    manifest = read_manifest(uri, plan.format) or {"shards": []}
    recorded = {entry["name"]: entry for entry in manifest["shards"]}
    missing = []
    for index in range(plan.num_shards):
        name = f"{index:08d}.parquet"
        file, entry = there.get(name), recorded.get(name)
        same = entry is None or (
            file is not None
            and (file.size, file.etag or entry["etag"]) == (entry["bytes"], entry["etag"])
        )
        if file is None or not same:
            missing.append(index)
    return missing


def read_manifest(uri: str, store_format: str = FORMAT) -> dict[str, Any] | None:
    """The manifest, None where the store is not finished. StoreError for another format."""
    manifest_uri = paths.join(uri, "manifest.json")
    if not paths.exists(manifest_uri):
        return None
    return _decode_manifest(manifest_uri, paths.read_bytes(manifest_uri), store_format)


def _decode_manifest(manifest_uri: str, data: bytes, store_format: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise StoreError(f"{manifest_uri} is not JSON: {error}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != store_format:
        raise StoreError(f"{manifest_uri} is not of format {store_format}, but {found}.")
    return manifest


def finished_manifest(uri: str, store_format: str = FORMAT) -> dict[str, Any]:
    """The manifest. Raises StoreError where there is no store or it is not finished."""
    manifest = read_manifest(uri, store_format)
    if manifest is None:
        planned = paths.exists(paths.join(uri, PLAN))
        why = (
            "its precompute has not finished; run the same command again"
            if planned
            else "there is no store"
        )
        raise StoreError(f"{uri} has no manifest.json: {why}.")
    return manifest


def commit(uri: str, plan: Plan, run: Mapping[str, Any], each: Each = map) -> dict[str, Any]:
    """Check that every planned image is in exactly one place, then write the manifest; returns it.

    What depends on when and where it ran is under "run"; the rest depends on images, model and
    recipe alone. Where a manifest is there already its content must be the same; only ETags that
    are no MD5s may differ, and are renewed. `each` is `map`, or spreads its calls over a cluster:
    every shard's footer is read. Raises StoreError where something is missing, and StoreMismatch
    where the manifest that is there says something else.
    """
    files = files_in(uri, "shards")
    names = [f"{i:08d}.parquet" for i in range(plan.num_shards)]
    absent = [i for i, name in enumerate(names) if name not in files]
    if absent:
        raise StoreError(
            f"{uri}: {len(absent)} of {plan.num_shards} shards are missing, the first {absent[0]}."
        )
    entries: list[dict[str, Any]] = []
    statistics: dict[str, ChannelStats] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    some_at_once = (
        (uri, plan.fingerprint, at, [files[name] for name in names[at : at + SHARDS_AT_ONCE]])
        for at in range(0, len(names), SHARDS_AT_ONCE)
    )  # fmt: skip
    for described, some_statistics, some_shapes in each(describe_shards, some_at_once):
        for index, entry in enumerate(described, len(entries)):
            planned = plan.shard_rows(index)
            if entry["rows"] + entry["errors"] != planned:
                raise StoreError(
                    f"{uri}: shard {index} holds {entry['rows']} rows and "
                    f"{entry['errors']} errors "
                    f"of {planned} planned images."
                )
        entries += described
        shapes = some_shapes
        _merge(statistics, some_statistics)
    first = files[names[0]]
    del files, names
    recorded = sum(1 for _ in read_errors(uri, each))
    errors = sum(entry["errors"] for entry in entries)
    if recorded != errors:
        raise StoreError(f"{uri}: {errors} errors in the shards, {recorded} recorded in errors/.")
    manifest = {
        "format": plan.format,
        "fingerprint": plan.fingerprint,
        "parts": dict(plan.parts),
        "source": plan.source,
        "account": plan.account,
        "shard_size": plan.shard_size,
        "planned": plan.num_images,
        "stored": sum(entry["rows"] for entry in entries),
        "errors": errors,
        **(
            _text_contents(first, entries, shapes[STATES][-1])
            if plan.format == TEXT_FORMAT
            else _latent_contents(shapes, statistics)
        ),
        "shards": entries,
    }
    assert manifest["planned"] == manifest["stored"] + manifest["errors"]
    whole = manifest | {"run": {**run, "versions": versions()}}
    with contextlib.suppress(FileExistsError):
        paths.write_once(paths.join(uri, "manifest.json"), encode_manifest(whole))
        return whole
    return _agreed(uri, manifest)


def _agreed(uri: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest that is there already, with this one's ETags where they may be renewed.

    Raises StoreMismatch where it says something else than `manifest`.
    """
    manifest_uri = paths.join(uri, "manifest.json")
    known = paths.read_bytes(manifest_uri)
    existing = _decode_manifest(manifest_uri, known, manifest["format"])
    differing = [key for key in manifest if manifest[key] != existing.get(key)]
    if not differing:
        return existing
    if differing == ["shards"] and _may_renew(uri, manifest["shards"], existing["shards"]):
        renewed = existing | {"shards": manifest["shards"]}
        if paths.replace(manifest_uri, known, encode_manifest(renewed)):
            return renewed
        return _agreed(uri, manifest)  # another driver has renewed it meanwhile
    raise StoreMismatch(
        f"{manifest_uri} exists and differs in: {', '.join(differing)}. The store changed after it "
        "was finished; `fae inspect --verify` finds what changed."
    )


def _may_renew(uri: str, now: Sequence[dict[str, Any]], then: Sequence[dict[str, Any]]) -> bool:
    """Whether the entries differ in ETags alone, which are no MD5s and still those of the shards:
    another driver may have written shards after this one listed them.
    """
    if [entry | {"etag": ""} for entry in now] != [entry | {"etag": ""} for entry in then]:
        return False
    written = [a for a, b in zip(now, then, strict=True) if a["etag"] != b["etag"]]
    there = files_in(uri, "shards")
    if any(e["name"] not in there or there[e["name"]].etag != e["etag"] for e in now):
        return False

    def is_md5(entry: dict[str, Any]) -> bool:
        data = paths.read_bytes(there[entry["name"]].uri)
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == entry["etag"]

    with ThreadPoolExecutor(THREADS) as pool:
        return not any(pool.map(is_md5, written))


def _latent_contents(
    shapes: Mapping[str, tuple[int, ...]], statistics: Mapping[str, ChannelStats]
) -> dict[str, Any]:
    return {
        "columns": list(shapes),
        "latent_shape": list(next(iter(shapes.values()))),
        "statistics": {
            name: {**stats.to_dict(), "mean": stats.mean.tolist(), "std": stats.std.tolist()}
            for name, stats in statistics.items()
        },
    }


def _text_contents(
    first: paths.FileInfo, entries: Sequence[Mapping[str, Any]], width: int
) -> dict[str, Any]:
    """Of token states of `width`; those of the empty caption are what the `first` shard says."""
    _, info, _ = _describe(first)
    return {
        "columns": [STATES],
        "state_dim": width,
        "tokens": sum(entry["tokens"] for entry in entries),
        "empty": info["empty"],
    }


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """JSON with one line a shard: json's indentation takes twice the time and thrice the memory."""
    head = json.dumps({**manifest, "shards": []}, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in manifest["shards"])
    # Inside a string the quotes would have a backslash, so this is the key itself.
    return head.replace('"shards": []', f'"shards": [\n  {lines}\n ]', 1).encode()


def describe_shards(
    some: tuple[str, str, int, Sequence[paths.FileInfo]],
) -> tuple[list[dict[str, Any]], dict[str, ChannelStats], dict[str, tuple[int, ...]]]:
    """Manifest entries, merged statistics and column shapes of some shards.

    `some` is (store, fingerprint, number of the first shard, shard files).
    """
    uri, fingerprint, start, files = some
    entries: list[dict[str, Any]] = []
    statistics: dict[str, ChannelStats] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for index, (entry, info, some_shapes) in enumerate(pool.map(_describe, files), start):
            if info["fingerprint"] != fingerprint or info["shard"] != index:
                raise StoreError(
                    f"{uri}: shard {index} belongs to another store; delete it and run again."
                )
            entries.append(entry)
            shapes = some_shapes
            of_shard = {n: ChannelStats.from_dict(v) for n, v in info["statistics"].items()}
            _merge(statistics, of_shard)
    return entries, statistics, shapes


def _merge(totals: dict[str, ChannelStats], more: Mapping[str, ChannelStats]) -> None:
    for name, stats in more.items():
        if name in totals:
            totals[name].merge(stats)
        else:
            totals[name] = stats


def _describe(
    file: paths.FileInfo,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]]]:
    """(manifest entry, footer's notes, shapes of the latents or states) of a shard file."""
    name = file.uri.rpartition("/")[2]
    try:
        with paths.open_input(file.uri) as handle:
            etag = file.etag or _md5(handle)
            parquet = pq.ParquetFile(handle)
            metadata, schema = parquet.metadata, parquet.schema_arrow
        info = json.loads(schema.metadata[b"fae"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{file.uri} is not a whole shard ({error}); delete it and run again."
        ) from None
    shapes = {f.name: tuple(f.type.shape) for f in schema if f.name in LATENT_COLUMNS}
    sizes = {name: 2 * metadata.num_rows * math.prod(shape) for name, shape in shapes.items()}
    if "tokens" in info:
        shapes[STATES] = (info["tokens"], state_width(schema))
        sizes[STATES] = 2 * math.prod(shapes[STATES])
    entry = {
        "name": name,
        "rows": metadata.num_rows,
        "errors": info["errors"],
        "bytes": file.size,
        "etag": etag,
        "offsets": value_offsets(metadata, sizes),
    }
    if "tokens" in info:
        entry["tokens"] = info["tokens"]
    return entry, info, shapes


def _md5(handle: pa.NativeFile) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := handle.read(1 << 22):
        digest.update(chunk)
    handle.seek(0)
    return digest.hexdigest()
