"""Sources to planned records: folders, Parquet, WebDataset shards and lists, local or on S3.

`plan_source` lists a source as an Arrow table, the plan of every job on images, with an account of
everything that was listed. It reads no pixels; reading.py and crops.py read and decode what it
names. Plain functions without Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from ..config.sections import DataSection
from ..storage import paths
from .account import Account
from .conventions import number_labels
from .folder import plan_folder
from .listing import ends_with, in_order, list_addresses
from .parquet_files import parquet_columns
from .records import (
    IMAGE_SUFFIXES,
    RECORDS,
    ROWS_AT_ONCE,
    ImageRecord,
    SourceError,
    batched,
    records_of,
    records_table,
)
from .tables import LISTS, plan_list, plan_parquet
from .webdataset import COMPRESSED_TAR, plan_tars


@dataclass(frozen=True)
class Source:
    """The planned images of a source in key order, columns RECORDS, and the account of the rest."""

    table: pa.Table
    account: Account
    large_groups: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    """Parquet: by file, the large row groups and their rows (first, behind the last)."""


def plan_source(data: DataSection) -> Source:
    """The images of `data.path` in key order, the first `data.limit` of them, and their account.

    No pixels are read. Raises SourceError for a missing path, an empty source, an unknown column, a
    repeated key, and where a setting has to decide what is meant.
    """
    if not data.path:
        raise SourceError("data.path is not set. Give a folder, a file, an s3:// prefix or hf://.")
    account = Account(data.path)
    uris = list_addresses(data, account)
    if not len(uris) and not paths.exists(data.path):
        raise SourceError(f"data.path={data.path!r} does not exist.")
    account.source_format = _detect(uris, data) if data.format == "auto" else data.format
    large: dict[str, dict[int, tuple[int, int]]] = {}
    if account.source_format == "folder":
        table = plan_folder(uris, data, account)
    else:
        addresses = uris.to_pylist()
        if account.source_format == "parquet":
            records = plan_parquet(addresses, data, account, large)
        elif account.source_format == "webdataset":
            records = plan_tars(addresses, data, account)
        else:
            records = plan_list(addresses, data, account)
        table, names = _numbered(records, data.path)
        account.class_names = names or account.class_names
        table = in_order(table, "key", "uri")
    if not len(table):
        if not account.num_files:
            raise SourceError(
                f"data.path={data.path!r} holds no files. Give a folder of images, Parquet files, "
                "tar shards or a list."
            )
        reasons = "; ".join(f"{s.count} {reason}" for reason, s in account.skipped.items())
        raise SourceError(
            f"data.path={data.path!r} holds no images (0 of {account.num_files} files; read as "
            f"{account.source_format}). Skipped: {reasons or 'nothing'}."
        )
    _refuse_repeated_keys(table)
    table = table.slice(0, data.limit)
    account.num_images = len(table)
    account.num_labels = len(table) - table["label"].null_count
    account.num_classes = pc.count_distinct(table["label"]).as_py()
    account.num_captions = len(table) - table["caption"].null_count
    return Source(table, account, large)


def plan_images(data: DataSection) -> pa.Table:
    """The table of `plan_source`."""
    return plan_source(data).table


def list_images(data: DataSection) -> list[ImageRecord]:
    """The images of `plan_source` as records, for sources of which objects are no burden."""
    return records_of(plan_images(data))


def _numbered(records: Iterator[ImageRecord], path: str) -> tuple[pa.Table, list[str]]:
    """(table, class names) of records whose labels may be class names; those are numbered."""
    tables, labels = [], []
    for some in batched(records, ROWS_AT_ONCE):
        texts = [None if record.label is None else str(record.label) for record in some]
        labels.append(pa.array(texts, pa.large_string()))
        tables.append(records_table(some, with_labels=False))
    if not tables:
        return RECORDS.empty_table(), []
    numbers, names = number_labels(pa.chunked_array(labels), path)
    table = pa.concat_tables(tables)
    return table.set_column(
        RECORDS.get_field_index("label"), RECORDS.field("label"), numbers
    ), names


def _refuse_repeated_keys(table: pa.Table) -> None:
    repeated = pc.index(pc.equal(table["key"][:-1], table["key"][1:]), True).as_py()
    if repeated >= 0:
        first, second = records_of(table.slice(repeated, 2))
        raise SourceError(
            f"The key {first.key!r} occurs twice: {first.uri} and {second.uri}. Keys name "
            "images in the store; remove one, or choose another data.key_column."
        )


def _detect(uris: pa.ChunkedArray, data: DataSection) -> str:
    """What `uris` are, by their names; a lone Parquet file without the image column is a list."""
    suffixes = {
        "folder": IMAGE_SUFFIXES,
        "parquet": (".parquet",),
        "webdataset": (".tar", *COMPRESSED_TAR),
    }
    lone = uris[0].as_py() if len(uris) == 1 else ""
    if lone.lower().endswith(tuple(set(LISTS) - {".parquet"})):
        return "list"
    kinds = {kind: pc.sum(ends_with(uris, ends)).as_py() or 0 for kind, ends in suffixes.items()}
    kinds["parquet"] -= pc.sum(ends_with(uris, ["/metadata.parquet"])).as_py() or 0
    present = [kind for kind, count in kinds.items() if count > 0]
    if len(present) > 1:
        counts = ", ".join(f"{kinds[kind]} for {kind}" for kind in present)
        raise SourceError(
            f"data.path={data.path!r} holds several kinds ({counts}). Set data.format."
        )
    if present == ["parquet"] and lone:
        columns = parquet_columns(lone)
        if data.image_column not in columns and data.uri_column in columns:
            return "list"
    return present[0] if present else "folder"
