"""plan.parquet of a latent store: which image belongs to which shard.

It is fixed before the first image is read, so a killed and resumed job writes the same bytes as an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.records import (
    RECORDS,
    ImageRecord,
    records_of,
    records_table,
    source_digest,
    whole_records,
)
from ..storage import StoreError, differences, fingerprint_of, paths, refuse_other_work

FORMAT = "fae-latents-1"
TEXT_FORMAT = "fae-text-states-1"
"""Of a store of token states (token_states.py); all else that lies in a store is alike."""
PLAN = "plan.parquet"
PLAN_GROUPS = 16384
"""Row groups of a plan at most. A million would make a footer of a gigabyte for every worker."""


@dataclass(frozen=True)
class PlanId:
    """Which plan a job's tasks work on: the store's address and the plan's digest."""

    uri: str
    digest: str


@dataclass(frozen=True)
class Plan:
    """Which image belongs to which shard; `parts` are what the fingerprint hashes, in words."""

    uri: str
    num_images: int
    num_shards: int
    shard_size: int
    parts: Mapping[str, str]
    source: str
    account: Mapping[str, Any]
    """What the source held besides the planned images (data/account.py); empty where unknown."""
    has_captions: bool
    """Whether some image has several captions, which the shards' column `captions` holds."""
    format: str
    """FORMAT of a store of latents, or TEXT_FORMAT."""
    _file: pq.ParquetFile = field(repr=False, compare=False)
    _group_size: int = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over `parts`: everything but its image that decides a latent's bits."""
        return fingerprint_of(self.parts)

    @property
    def id(self) -> PlanId:
        """Its digest is over everything that decides what the shards hold, labels included."""
        held = {"parts": dict(self.parts), "source": self.source, "format": self.format}
        return PlanId(self.uri, fingerprint_of({**held, "shard size": self.shard_size}))

    def shard(self, index: int) -> list[ImageRecord]:
        """The records of shard `index` in key order; reads one row group, with few others."""
        group, start = divmod(index * self.shard_size, self._group_size)
        try:
            table = self._file.read_row_group(group, columns=RECORDS.names)
            return records_of(table.slice(start, self.shard_size))
        except OSError as error:
            raise paths.storage_error("read", paths.join(self.uri, PLAN), error) from None

    def table(self) -> pa.Table:
        """All records, with the columns RECORDS."""
        return whole_records(self._file.read(columns=RECORDS.names))

    def labels(self) -> Iterator[tuple[str, int | None]]:
        """(key, label) of every planned image in key order, a part of the file at a time."""
        for part in self._file.iter_batches(columns=["key", "label"]):
            yield from zip(part["key"].to_pylist(), part["label"].to_pylist(), strict=True)

    def captions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(key, captions) of every planned image in key order; without one they are empty."""
        names = ["key", "caption", *(["captions"] if self.has_captions else [])]
        for part in self._file.iter_batches(columns=names):
            for row in part.to_pylist():
                one = row["caption"]
                several = row.get("captions") or (() if one is None else (one,))
                yield row["key"], tuple(several)

    def shard_rows(self, index: int) -> int:
        """How many images shard `index` holds."""
        return min(self.shard_size, self.num_images - index * self.shard_size)


def ensure_plan(
    uri: str,
    records: pa.Table | Sequence[ImageRecord],
    shard_size: int,
    parts: Mapping[str, str],
    account: Mapping[str, Any] | None = None,
    store_format: str = FORMAT,
) -> Plan:
    """The store's plan, written now unless it is there.

    `records` is what `plan_images` gives, or records in key order. Images that vanished from the
    source since it was planned are no difference: they become errors of their shards. Raises
    StoreMismatch where the plan that is there differs.
    """
    records = whole_records(records) if isinstance(records, pa.Table) else records_table(records)
    source = source_digest(records)
    plan_uri = paths.join(uri, PLAN)
    if not paths.exists(plan_uri):
        # Where another driver was first, its plan is compared like any other.
        with contextlib.suppress(FileExistsError):
            data = _encode_plan(records, shard_size, parts, source, account, store_format)
            paths.write_once(plan_uri, data)
    plan = open_plan(uri)
    differing = differences(plan.parts, parts, show=str)
    if plan.format != store_format:
        differing.append(f"format: {plan.format} there, {store_format} now")
    if plan.shard_size != shard_size:
        differing.append(f"shard size: {plan.shard_size} there, {shard_size} now")
    if plan.source != source:
        differing += _source_differences(plan, records)
    refuse_other_work(
        f"{uri} holds a store with another plan",
        differing,
        "Nothing was changed. Choose another output=, or give the values of its plan.",
    )
    return plan


def open_plan(uri: str) -> Plan:
    """The plan of the store at `uri`. Raises StorageError, or StoreError for another file."""
    plan_uri = paths.join(uri, PLAN)
    try:
        # Read in ranges: a worker wants the footer, and now and then one row group.
        file = pq.ParquetFile(paths.open_input(plan_uri), pre_buffer=True)
        info = json.loads(file.schema_arrow.metadata[b"fae"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{plan_uri} is no plan of a latent store: {error}") from None
    rows, shard_size = file.metadata.num_rows, int(info["shard_size"])
    # A group holds whole shards: its rows are a multiple of theirs, unless it is the only group.
    group_size = max(shard_size, file.metadata.row_group(0).num_rows) if rows else shard_size
    return Plan(
        uri,
        rows,
        -(-rows // shard_size),
        shard_size,
        info["parts"],
        str(info["source"]),
        info.get("account", {}),
        "captions" in file.schema_arrow.names,
        str(info.get("format", FORMAT)),
        file,
        group_size,
    )


def _encode_plan(
    records: pa.Table,
    shard_size: int,
    parts: Mapping[str, str],
    source: str,
    account: Mapping[str, Any] | None,
    store_format: str,
) -> bytes:
    info = {
        "format": store_format,
        "shard_size": shard_size,
        "parts": dict(parts),
        "source": source,
    }
    if account is not None:
        info["account"] = dict(account)
    fields = [
        ("shard", pa.int64()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
    ]
    if records["captions"].null_count < len(records):
        fields.append(("captions", pa.list_(pa.string())))
    schema = pa.schema(fields, metadata={"fae": json.dumps(info)})
    records = records.select([name for name, _ in fields[1:]])
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
    if any(table["captions"].null_count < len(table) for table in (now, then)):
        pairs = zip(now["captions"].to_pylist(), then["captions"].to_pylist(), strict=True)
        changed |= np.array([a != b for a, b in pairs])
    found = []
    if len(added):
        key = added["key"][0].as_py()
        found.append(f"source: {len(added)} images more than planned, the first {key!r}")
    if changed.any():
        first = int(changed.argmax())
        ((there,), (here,)) = (records_of(table.slice(first, 1)) for table in (then, now))
        found.append(
            f"source: {int(changed.sum())} images with another address, label or caption, the "
            f"first "
            f"{here.key!r} ({there} there, {here} now)"
        )
    return found
