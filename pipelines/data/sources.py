"""Sources to planned records: folders, Parquet, WebDataset shards and lists, local or on S3.

`plan_images` lists a source as an Arrow table, the plan of every job on images, and reads no
pixels; reading.py and crops.py read and decode what it names. Plain functions without Ray.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from ..config.sections import DataSection
from ..storage import paths
from .listing import ends_with, in_order, list_addresses, relative_path
from .records import IMAGE_SUFFIXES, RECORDS, ImageRecord, SourceError, records_of, records_table
from .tables import parquet_schema, plan_list, plan_parquet
from .webdataset import COMPRESSED_TAR, plan_tars


def plan_images(data: DataSection) -> pa.Table:
    """The images of `data.path` in key order, the first `data.limit` of them: columns RECORDS.

    No pixels are read. Raises SourceError for a missing path, an empty source, an unknown column or
    a repeated key.
    """
    if not data.path:
        raise SourceError("data.path is not set. Give a folder, a file or an s3:// prefix.")
    uris = list_addresses(data.path)
    if not len(uris) and not paths.exists(data.path):
        raise SourceError(f"data.path={data.path!r} does not exist.")
    source_format = _detect(uris, data) if data.format == "auto" else data.format
    if source_format == "folder":
        table = _plan_folder(uris, data)
    else:
        plan = {"parquet": plan_parquet, "webdataset": plan_tars, "list": plan_list}[source_format]
        table = in_order(records_table(plan(uris.to_pylist(), data)), "key", "uri")
    if not len(table):
        raise SourceError(
            f"data.path={data.path!r} holds no images (0 of {len(uris)} files; read as "
            f"{source_format}). Hidden files and links that leave the source are not read."
        )
    repeated = pc.index(pc.equal(table["key"][:-1], table["key"][1:]), True).as_py()
    if repeated >= 0:
        first, second = records_of(table.slice(repeated, 2))
        raise SourceError(
            f"The key {first.key!r} occurs twice: {first.uri} and {second.uri}. Keys name "
            "images in the store; remove one, or choose another data.key_column."
        )
    return table.slice(0, data.limit)


def list_images(data: DataSection) -> list[ImageRecord]:
    """`plan_images` as records, for sources of which Python objects are no burden."""
    return records_of(plan_images(data))


def _detect(uris: pa.ChunkedArray, data: DataSection) -> str:
    """What `uris` are, by their names; a lone Parquet file without the image column is a list."""
    suffixes = {
        "folder": IMAGE_SUFFIXES,
        "parquet": (".parquet",),
        "webdataset": (".tar", *COMPRESSED_TAR),
    }
    kinds = {kind: pc.sum(ends_with(uris, ends)).as_py() or 0 for kind, ends in suffixes.items()}
    present = [kind for kind, count in kinds.items() if count]
    if len(present) > 1:
        counts = ", ".join(f"{kinds[kind]} for {kind}" for kind in present)
        raise SourceError(
            f"data.path={data.path!r} holds several kinds ({counts}). Set data.format."
        )
    lone = uris[0].as_py() if len(uris) == 1 else ""
    if lone.lower().endswith(".csv"):
        return "list"
    if present == ["parquet"] and lone:
        columns = parquet_schema(lone).names
        if data.image_column not in columns and data.uri_column in columns:
            return "list"
    return present[0] if present else "folder"


def _plan_folder(uris: pa.ChunkedArray, data: DataSection) -> pa.Table:
    images = uris.filter(ends_with(uris, IMAGE_SUFFIXES))
    if not len(images):
        return RECORDS.empty_table()
    first = images[0].as_py()
    start = len(first) - len(relative_path(first, str(data.path)))
    # All begin with the same folder, so keys are in the order of the addresses.
    keys = pc.utf8_slice_codeunits(images, start)
    labels = pa.nulls(len(keys), pa.int64())
    if pc.all(pc.match_substring(keys, "/")).as_py():
        classes = pc.replace_substring_regex(keys, "(?s)/.*", "")
        names = pa.array(sorted(pc.unique(classes).to_pylist()), pa.large_string())
        labels = pc.index_in(classes, value_set=names).cast(pa.int64())
    return pa.table([keys, images, labels, pa.nulls(len(keys), pa.large_string())], schema=RECORDS)
