"""The latent store on disk or S3: plan, one Parquet object a shard, and a manifest written once, last.

```
plan.parquet               immutable: shard, key, uri, label, caption; sorted by key, a row group holds whole shards
shards/00000042.parquet    key, label, caption and the latents of shard 42, written whole
errors/00000042.parquet    key, stage, message of its images that could not be encoded; absent where there are none
manifest.json              written once; readers trust it alone
```
Latents are uncompressed in one page a shard, so a row is one range of the file (`offsets` in the manifest), while any
Parquet reader sees `arrow.fixed_shape_tensor<float16>`. latent_reader.py reads; this module writes and verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fae_core.errors import UserError
from fae_core.latent_stats import ChannelStats
from pipelines import storage
from pipelines.sources import RECORDS, ImageRecord, batched, records_of, records_table

FORMAT = "fae-latents-1"
PLAN = "plan.parquet"
LATENT_COLUMNS = ("mean", "logvar", "mean_flip", "logvar_flip")
THREADS = 16
PLAN_GROUPS = 16384
"""Row groups of a plan at most. A million would be a footer of a gigabyte, which every worker has to read."""
SHARDS_AT_ONCE = 2048
"""Shards that are described together when a store is committed."""
WORD_COLUMNS = {"key": pa.string(), "label": pa.int64(), "caption": pa.string()}
"""Cast to these before a value is looked at: those of some extension types would run code."""
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or what spreads its calls over a cluster and gives their results in order."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_ERROR_SCHEMA = pa.schema([("key", pa.string()), ("stage", pa.string()), ("message", pa.string())])
# One data page a column: Parquet's own limits are set out of reach.
_ONE_PAGE = {"data_page_size": 2**31 - 1, "max_rows_per_page": 2**31 - 1}


class StoreError(UserError, ValueError):
    """A latent store that cannot be read or completed; the message says why."""


class StoreMismatch(StoreError):
    """The output holds another model's, recipe's or source's store; the message names the part that differs."""


def shard_uri(uri: str, index: int) -> str:
    """Address of shard `index` of the store `uri`."""
    return storage.join(uri, "shards", f"{index:08d}.parquet")


def errors_uri(uri: str, index: int) -> str:
    """Address of the errors of shard `index`; the file exists only where there are errors."""
    return storage.join(uri, "errors", f"{index:08d}.parquet")


# Plan -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which image belongs to which shard; `parts` are what the fingerprint hashes, in words."""

    uri: str
    num_images: int
    num_shards: int
    shard_size: int
    parts: Mapping[str, str]
    source: str
    _file: pq.ParquetFile = field(repr=False, compare=False)
    _group_size: int = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over `parts`: everything but its image that decides a latent's bits."""
        return fingerprint_of(self.parts)

    def shard(self, index: int) -> list[ImageRecord]:
        """The records of shard `index` in key order; reads one row group, which holds this shard and few others."""
        group, start = divmod(index * self.shard_size, self._group_size)
        try:
            table = self._file.read_row_group(group, columns=RECORDS.names)
            return records_of(table.slice(start, self.shard_size))
        except OSError as error:
            raise storage.storage_error("read", storage.join(self.uri, PLAN), error) from None

    def table(self) -> pa.Table:
        """All records, with the columns RECORDS."""
        return self._file.read(columns=RECORDS.names).cast(RECORDS)

    def shard_rows(self, index: int) -> int:
        """How many images shard `index` holds."""
        return min(self.shard_size, self.num_images - index * self.shard_size)


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """SHA-256 of `parts`, independent of their order."""
    return hashlib.sha256(json.dumps(dict(sorted(parts.items()))).encode()).hexdigest()


def source_digest(records: pa.Table | Sequence[ImageRecord]) -> str:
    """SHA-256 over key, uri, label and caption of every record in order."""
    digest = hashlib.sha256()
    table = records if isinstance(records, pa.Table) else records_table(records)
    for batch in table.to_batches(max_chunksize=8192):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def ensure_plan(
    uri: str,
    records: pa.Table | Sequence[ImageRecord],
    shard_size: int,
    parts: Mapping[str, str],
) -> Plan:
    """The store's plan, written now unless it is there. Raises StoreMismatch where the one that is there differs.

    `records` is what `plan_images` gives, or records in key order. Images that vanished from the source since it was planned do not differ: they become errors of their shards.
    """
    if not isinstance(records, pa.Table):
        records = records_table(records)
    source = source_digest(records)
    plan_uri = storage.join(uri, PLAN)
    if not storage.exists(plan_uri):
        # Where another driver was first, its plan is compared like any other.
        with contextlib.suppress(FileExistsError):
            storage.write_once(plan_uri, _encode_plan(records, shard_size, parts, source))
    plan = open_plan(uri)
    differing = [
        f"{name}: {plan.parts.get(name, 'nothing')} there, {parts.get(name, 'nothing')} now"
        for name in sorted(plan.parts.keys() | parts.keys())
        if plan.parts.get(name) != parts.get(name)
    ]
    if plan.shard_size != shard_size:
        differing.append(f"shard size: {plan.shard_size} there, {shard_size} now")
    if plan.source != source:
        differing += _source_differences(plan, records)
    if differing:
        raise StoreMismatch(
            f"{uri} holds a store that was planned otherwise:\n  "
            + "\n  ".join(differing)
            + "\nNothing was changed. Choose another output=, or give what it was planned with."
        )
    return plan


def open_plan(uri: str) -> Plan:
    """The plan of the store at `uri`. Raises StorageError, or StoreError where the file is no plan."""
    plan_uri = storage.join(uri, PLAN)
    try:
        # Read in ranges: a worker wants the footer and now and then a row group of a plan that may be large.
        file = pq.ParquetFile(storage.open_input(plan_uri), pre_buffer=True)
        info = json.loads(file.schema_arrow.metadata[b"fae"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{plan_uri} is no plan of a latent store: {error}") from None
    rows, shard_size = file.metadata.num_rows, int(info["shard_size"])
    # Shards of one group are whole ones, so its rows are a multiple of theirs, save where it is the only group.
    group_size = max(shard_size, file.metadata.row_group(0).num_rows) if rows else shard_size
    return Plan(
        uri,
        rows,
        -(-rows // shard_size),
        shard_size,
        info["parts"],
        str(info["source"]),
        file,
        group_size,
    )


def _encode_plan(
    records: pa.Table, shard_size: int, parts: Mapping[str, str], source: str
) -> bytes:
    info = {"format": FORMAT, "shard_size": shard_size, "parts": dict(parts), "source": source}
    schema = pa.schema(
        [
            ("shard", pa.int64()),
            ("key", pa.string()),
            ("uri", pa.string()),
            ("label", pa.int64()),
            ("caption", pa.string()),
        ],
        metadata={"fae": json.dumps(info)},
    )
    num_shards = -(-len(records) // shard_size)
    group_size = shard_size * max(1, -(-num_shards // PLAN_GROUPS))
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for start in range(0, len(records), group_size):
            rows = records.slice(start, group_size)
            numbers = pa.array((start + np.arange(len(rows))) // shard_size, pa.int64())
            rows = rows.add_column(0, "shard", numbers).cast(schema)
            writer.write_table(rows, row_group_size=group_size)
    return buffer.getvalue()


def _source_differences(plan: Plan, records: pa.Table) -> list[str]:
    planned = plan.table()
    places = pc.index_in(records["key"], value_set=planned["key"])
    added = records.filter(pc.is_null(places))
    now, then = records.filter(pc.is_valid(places)), planned.take(places.drop_null())
    changed = np.zeros(len(now), bool)
    for name in ("uri", "label", "caption"):
        unequal = pc.not_equal(now[name], then[name])
        one_is_null = pc.xor(pc.is_null(now[name]), pc.is_null(then[name]))
        changed |= pc.coalesce(unequal, one_is_null).to_numpy()
    found = []
    if len(added):
        key = added["key"][0].as_py()
        found.append(f"source: {len(added)} images more than planned, the first {key!r}")
    if changed.any():
        first = int(changed.argmax())
        ((there,), (here,)) = (records_of(table.slice(first, 1)) for table in (then, now))
        found.append(
            f"source: {int(changed.sum())} images with another address, label or caption, the first "
            f"{here.key!r} ({there} there, {here} now)"
        )
    return found


# Shards ---------------------------------------------------------------------------------------------------------------


def missing_shards(uri: str, plan: Plan) -> list[int]:
    """Shards still to be encoded: not there, or not as the manifest (where there is one) recorded them."""
    there = {f.uri.rpartition("/")[2]: f for f in storage.list_files(storage.join(uri, "shards"))}
    recorded = {entry["name"]: entry for entry in (read_manifest(uri) or {"shards": []})["shards"]}
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


def write_shard(
    uri: str,
    index: int,
    records: Sequence[ImageRecord],
    kept: Sequence[int],
    latents: Mapping[str, np.ndarray],
    errors: Sequence[Mapping[str, str]],
    fingerprint: str,
) -> str:
    """Write shard `index` and its errors; returns the shard's ETag.

    `records` is the plan's shard, `kept` the places of those that have latents (float16 [n, C, H, W] each), `errors`
    the others' key, stage and message. Writing again replaces a file by the same bytes. The errors come first:
    a shard that is there has its errors beside it. Raises ValueError where an image is in both places or in none.
    """
    accounted = sorted([records[i].key for i in kept] + [e["key"] for e in errors])
    if accounted != sorted(r.key for r in records):
        raise ValueError(
            f"Shard {index}: {len(records)} images planned, but latents and errors do not name each once."
        )
    if errors:
        table = pa.Table.from_pylist(sorted((dict(e) for e in errors), key=lambda e: e["key"]))
        buffer = io.BytesIO()
        pq.write_table(table.cast(_ERROR_SCHEMA), buffer, compression="zstd")
        storage.write_bytes(errors_uri(uri, index), buffer.getvalue())
    elif storage.exists(errors_uri(uri, index)):
        storage.delete(errors_uri(uri, index))
    rows = [records[i] for i in kept]
    data = encode_shard(index, rows, latents, len(errors), fingerprint)
    return storage.write_bytes(shard_uri(uri, index), data)


def encode_shard(
    index: int,
    records: Sequence[ImageRecord],
    latents: Mapping[str, np.ndarray],
    num_errors: int,
    fingerprint: str,
) -> bytes:
    """The Parquet bytes of a shard: the same for the same input and version of pyarrow."""
    statistics = {}
    columns: dict[str, Any] = {
        "key": pa.array([r.key for r in records], pa.string()),
        "label": pa.array([r.label for r in records], pa.int64()),
        "caption": pa.array([r.caption for r in records], pa.string()),
    }
    for name, values in latents.items():
        values = np.ascontiguousarray(values, np.float16)
        if len(values) != len(records):
            raise ValueError(
                f"Shard {index}: {len(values)} rows of {name} for {len(records)} keys."
            )
        stats = ChannelStats.empty(values.shape[1])
        stats.update(np.moveaxis(values, 1, -1))
        statistics[name] = stats.to_dict()
        columns[name] = _tensor_array(values)
    info = {
        "format": FORMAT,
        "shard": index,
        "fingerprint": fingerprint,
        "errors": num_errors,
        "statistics": statistics,
    }
    table = pa.table(columns).replace_schema_metadata({"fae": json.dumps(info)})
    buffer = io.BytesIO()
    compression = {name: "none" if name in latents else "zstd" for name in columns}
    options: dict[str, Any] = {"compression": compression, **_ONE_PAGE}
    pq.write_table(
        table,
        buffer,
        row_group_size=max(len(records), 1),
        use_dictionary=False,
        write_statistics=["key"],
        write_page_checksum=True,
        **options,
    )
    data = buffer.getvalue()
    offsets = latent_offsets(
        pq.read_metadata(io.BytesIO(data)), {n: v.shape for n, v in latents.items()}
    )
    for name, values in latents.items():
        start = offsets[name]
        size = values.size * 2
        if data[start : start + size] != np.ascontiguousarray(values, np.float16).tobytes():
            raise AssertionError(f"Parquet did not lay {name} out in one page.")
    return data


def _tensor_array(values: np.ndarray) -> pa.Array:
    shape = values.shape[1:]
    storage_array = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), int(np.prod(shape))
    )
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), shape), storage_array)


def latent_offsets(
    metadata: pq.FileMetaData, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Byte offset in the file of each latent column's values: the end of its one uncompressed page."""
    offsets = {}
    if metadata.num_row_groups == 0:
        return dict.fromkeys(shapes, 0)
    group = metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        name = column.path_in_schema.partition(".")[0]
        if name in shapes:
            end = column.data_page_offset + column.total_compressed_size
            offsets[name] = end - metadata.num_rows * int(np.prod(shapes[name][-3:])) * 2
    return offsets


def read_errors(uri: str, each: Each = map) -> Iterator[dict[str, str]]:
    """Every recorded error (key, stage, message) of finished shards, in shard order; `each` as for `commit`."""
    files = sorted(f.uri for f in storage.list_files(storage.join(uri, "errors")))
    for rows in each(_read_error_files, batched(files, SHARDS_AT_ONCE)):
        yield from rows


def _read_error_files(uris: Sequence[str]) -> list[dict[str, str]]:
    with ThreadPoolExecutor(THREADS) as pool:
        return [row for rows in pool.map(_read_errors, uris) for row in rows]


def _read_errors(uri: str) -> list[dict[str, str]]:
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    rows: list[dict[str, str]] = table.select(_ERROR_SCHEMA.names).cast(_ERROR_SCHEMA).to_pylist()
    return rows


# Manifest -------------------------------------------------------------------------------------------------------------


def read_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest, or None where the store is not finished. Raises StoreError for another format."""
    manifest_uri = storage.join(uri, "manifest.json")
    if not storage.exists(manifest_uri):
        return None
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(manifest_uri))
    except ValueError as error:
        raise StoreError(f"{manifest_uri} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{manifest_uri} is not of format {FORMAT}.")
    return manifest


def commit(uri: str, plan: Plan, run: Mapping[str, Any], each: Each = map) -> dict[str, Any]:
    """Check that every planned image is in exactly one place, then write the manifest; returns it.

    What depends on when and where it ran is under "run"; the rest depends on images, model and recipe alone. Where a
    manifest is there already its content must be the same. `each` is `map`, or spreads its calls over a cluster: every
    shard's footer is read. Raises StoreError where something is missing.
    """
    files = {f.uri.rpartition("/")[2]: f for f in storage.list_files(storage.join(uri, "shards"))}
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
        (uri, plan.fingerprint, start, [files[name] for name in names[start : start + SHARDS_AT_ONCE]])
        for start in range(0, len(names), SHARDS_AT_ONCE)
    )  # fmt: skip
    for described, some_statistics, some_shapes in each(describe_shards, some_at_once):
        for index, entry in enumerate(described, len(entries)):
            planned = plan.shard_rows(index)
            if entry["rows"] + entry["errors"] != planned:
                raise StoreError(
                    f"{uri}: shard {index} holds {entry['rows']} latents and {entry['errors']} errors "
                    f"of {planned} planned images."
                )
        entries += described
        shapes = some_shapes
        _merge(statistics, some_statistics)
    del files, names
    recorded = sum(1 for _ in read_errors(uri, each))
    errors = sum(entry["errors"] for entry in entries)
    if recorded != errors:
        raise StoreError(f"{uri}: {errors} errors in the shards, {recorded} recorded in errors/.")
    manifest = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "parts": dict(plan.parts),
        "source": plan.source,
        "shard_size": plan.shard_size,
        "planned": plan.num_images,
        "stored": sum(entry["rows"] for entry in entries),
        "errors": errors,
        "columns": list(shapes),
        "latent_shape": list(next(iter(shapes.values()))),
        "statistics": {
            name: {**stats.to_dict(), "mean": stats.mean.tolist(), "std": stats.std.tolist()}
            for name, stats in statistics.items()
        },
        "shards": entries,
    }
    assert manifest["planned"] == manifest["stored"] + manifest["errors"]
    whole = manifest | {"run": {**run, "versions": versions()}}
    try:
        storage.write_once(storage.join(uri, "manifest.json"), encode_manifest(whole))
        return whole
    except FileExistsError:
        existing = read_manifest(uri) or {}
        differing = [key for key in manifest if manifest[key] != existing.get(key)]
        if differing:
            raise StoreMismatch(
                f"{uri}/manifest.json is there and says otherwise in: {', '.join(differing)}. "
                "The store changed after it was finished; `fae inspect --verify` says where."
            ) from None
        return existing


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """JSON with one line a shard: json's own indentation takes twice as long and three times the memory."""
    head = json.dumps({**manifest, "shards": []}, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in manifest["shards"])
    # Inside a string the quotes would have a backslash, so this is the key itself.
    return head.replace('"shards": []', f'"shards": [\n  {lines}\n ]', 1).encode()


def describe_shards(
    some: tuple[str, str, int, Sequence[storage.FileInfo]],
) -> tuple[list[dict[str, Any]], dict[str, ChannelStats], dict[str, tuple[int, ...]]]:
    """Manifest entries, merged statistics and column shapes of (store, fingerprint, first shard's number, shard files)."""
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
    file: storage.FileInfo,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]]]:
    """(manifest entry, what the writer noted in the footer, shapes of the latent columns) of a shard file."""
    name = file.uri.rpartition("/")[2]
    try:
        with storage.open_input(file.uri) as handle:
            etag = file.etag or _md5(handle)
            parquet = pq.ParquetFile(handle)
            metadata, schema = parquet.metadata, parquet.schema_arrow
        info = json.loads(schema.metadata[b"fae"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{file.uri} is not a whole shard ({error}); delete it and run again."
        ) from None
    shapes = {f.name: tuple(f.type.shape) for f in schema if f.name in LATENT_COLUMNS}
    entry = {
        "name": name,
        "rows": metadata.num_rows,
        "errors": info["errors"],
        "bytes": file.size,
        "etag": etag,
        "offsets": latent_offsets(metadata, shapes),
    }
    return entry, info, shapes


def _md5(handle: pa.NativeFile) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := handle.read(1 << 22):
        digest.update(chunk)
    handle.seek(0)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides or made the latents."""
    names = ("torch", "timm", "pillow", "pyarrow", "numpy", "ray")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


# Verification ---------------------------------------------------------------------------------------------------------


def verify(uri: str, on_shard: Callable[[int, int], None] | None = None) -> list[str]:
    """Re-read every shard against the manifest and the plan; the problems in words, none if the store is sound.

    Finds a missing, truncated, changed, swapped or extra shard, a flipped byte anywhere in it, an image that is in two
    places or in none, and statistics that are not the latents'. `on_shard(done, of)` is called as it goes on.
    """
    manifest = read_manifest(uri)
    plan = open_plan(uri)
    if manifest is None:
        done = plan.num_shards - len(missing_shards(uri, plan))
        return [f"not finished: {done} of {plan.num_shards} shards, no manifest.json"]
    problems = []
    if plan.fingerprint != manifest["fingerprint"] or plan.source != manifest["source"]:
        problems.append("plan.parquet is not the plan that the manifest was made from")
    errors: dict[str, set[str]] = {}
    for file in storage.list_files(storage.join(uri, "errors")):
        name = file.uri.rpartition("/")[2]
        try:
            errors[name] = {row["key"] for row in _read_errors(file.uri)}
        except (pa.ArrowException, KeyError, OSError) as error:
            problems.append(f"errors/{name} is not readable: {error}")
    there = {f.uri.rpartition("/")[2] for f in storage.list_files(storage.join(uri, "shards"))}
    names = {entry["name"] for entry in manifest["shards"]}
    problems += [f"shards/{name} is not in the manifest" for name in sorted(there - names)]
    problems += [f"errors/{name} has no shard" for name in sorted(errors.keys() - names)]
    totals: dict[str, ChannelStats] = {}
    for done, (index, entry) in enumerate(enumerate(manifest["shards"]), 1):
        planned = {r.key for r in plan.shard(index)} if index < plan.num_shards else set()
        lost = errors.get(entry["name"], set())
        problems += [
            f"shards/{entry['name']} {problem}"
            for problem in _verify_shard(uri, index, entry, planned, lost, totals)
        ]
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
    uri: str,
    index: int,
    entry: Mapping[str, Any],
    planned: set[str],
    lost: set[str],
    totals: dict[str, ChannelStats],
) -> list[str]:
    if not storage.exists(shard_uri(uri, index)):
        return ["is missing"]
    data = storage.read_bytes(shard_uri(uri, index))
    if len(data) != entry["bytes"]:
        return [f"has {len(data)} bytes, the manifest says {entry['bytes']}"]
    # The ETag of a multipart or KMS-encrypted object is no MD5; page checksums and statistics remain.
    content = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if _MD5.fullmatch(entry["etag"]) and content != entry["etag"]:
        return ["has the right size and other bytes than when it was written"]
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        return [f"is not readable: {error}"]
    keys = table["key"].cast(WORD_COLUMNS["key"]).to_pylist()
    problems = []
    if len(keys) != entry["rows"] or len(lost) != entry["errors"]:
        problems.append(
            f"has {len(keys)} rows and {len(lost)} errors, the manifest says {entry['rows']} and {entry['errors']}"
        )
    if len(set(keys)) != len(keys) or set(keys) & lost or set(keys) | lost != planned:
        problems.append("and its errors do not name each planned image once")
    for name in table.column_names:
        if name in LATENT_COLUMNS:
            values = tensor_values(table[name])
            stats = totals.setdefault(name, ChannelStats.empty(values.shape[1]))
            stats.update(np.moveaxis(values, 1, -1))
    return problems


def tensor_values(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-shape tensor column as float16 [n, C, H, W]."""
    shape = tuple(column.type.shape)
    parts = [chunk.storage.flatten().to_numpy() for chunk in column.chunks]
    flat = np.concatenate(parts) if parts else np.empty(0, np.float16)
    return flat.reshape(-1, *shape)
