"""The files of a source, listed and sorted by address, with their paths relative to the source."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ..storage import paths
from .records import ROWS_AT_ONCE, batched, check_text


def list_addresses(path: str) -> pa.ChunkedArray:
    """Addresses of all visible files of the source, sorted."""
    uris = (file.uri for file in paths.list_files(path))
    visible = (
        uri
        for uri in uris
        if not any(part.startswith(".") for part in relative_path(uri, path).split("/"))
    )
    chunks = []
    for some in batched(visible, ROWS_AT_ONCE):
        check_text(*some)
        chunks.append(pa.array(some, pa.large_string()))
    table = pa.table({"uri": pa.chunked_array(chunks, pa.large_string())})
    return in_order(table, "uri")["uri"]


def in_order(table: pa.Table, *columns: str) -> pa.Table:
    """`table` sorted by `columns`; itself where it is sorted already, as a listing of S3 is."""
    first = table[columns[0]]
    if pc.all(pc.less(first[:-1], first[1:])).as_py() is not False:
        return table
    return table.sort_by([(column, "ascending") for column in columns])


def relative_path(uri: str, path: str) -> str:
    """`uri` below `path` with forward slashes; its file name where `path` is that file."""
    root = path.rstrip("/") if uri.startswith("s3://") else paths.filesystem(path)[1].rstrip("/")
    return posixpath.basename(uri) if uri == root else uri[len(root) + 1 :]


def ends_with(uris: pa.ChunkedArray, suffixes: Sequence[str]) -> pa.ChunkedArray:
    pattern = "|".join(re.escape(suffix) for suffix in suffixes)
    return pc.match_substring_regex(uris, f"(?:{pattern})$", ignore_case=True)
