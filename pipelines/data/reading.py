"""The encoded bytes of planned images: files, Parquet rows, ranges of tar files, local or on S3."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..config.sections import DataSection
from ..storage import paths, s3
from .account import Account
from .crops import ImageError, decode_records
from .listing import source_root
from .parquet_files import refuse_extensions
from .records import ImageRecord
from .row_groups import LARGE_BYTES, RowStreams, column_bytes, is_damage
from .tables import LISTS, beside, parent, plan_list

THREADS = s3.CONNECTIONS
OTHERS = 8
"""Files of a source that are tried to tell an image that is refused from a source that is."""

_ROW = re.compile(r"(.+)#row=(\d+)")
_RANGE = re.compile(r"(.+)#offset=(\d+)&size=(\d+)")


def load_crops(
    records: Sequence[ImageRecord], size: int, data: DataSection
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Crops uint8 [n, size, size, 3], their places in `records`, and the others' errors.

    It is `read_records`, then `decode_records`.
    """
    return decode_records(records, read_records(records, data), size, data)


def read_records(
    records: Sequence[ImageRecord], data: DataSection, streams: RowStreams | None = None
) -> list[bytes | Exception]:
    """The encoded bytes of each record, or the exception of one that cannot be read.

    An exception is about its image: it is not there, damaged, or refused while others can be read.
    Raises StorageError where the storage does not answer or refuses others too: another run may
    read them.

    Rows of one Parquet file are read together, one row group at a time and only the image column. A
    large row group is streamed; with `streams`, calls for rows in order read it once together. The
    ranges of one tar file share one open file; THREADS threads fetch objects and ranges on S3.
    What lies outside `data.path` is not read, whatever a plan says; only a list names other places.
    """
    blobs: list[bytes | Exception] = [ImageError("not read")] * len(records)
    rows: dict[str, list[tuple[int, int]]] = {}
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    remote: list[int] = []
    inside = _source_filter(data)
    for index, record in enumerate(records):
        if not inside(record.uri):
            blobs[index] = ImageError(f"{record.uri} is outside data.path")
        elif match := _ROW.fullmatch(record.uri):
            rows.setdefault(match[1], []).append((int(match[2]), index))
        elif match := _RANGE.fullmatch(record.uri):
            ranges.setdefault(match[1], []).append((int(match[2]), int(match[3]), index))
        elif paths.is_remote(record.uri):
            remote.append(index)
        else:
            blobs[index] = _attempt(paths.read_bytes, record.uri)
    with contextlib.ExitStack() as stack:
        open_streams = streams or stack.enter_context(RowStreams())
        for uri, wanted_rows in rows.items():
            _read_rows(uri, wanted_rows, data.image_column, blobs, open_streams)
    for uri, wanted_ranges in ranges.items():
        _read_ranges(uri, sorted(wanted_ranges), blobs)
    if remote:
        with ThreadPoolExecutor(min(THREADS, len(remote))) as pool:
            uris = [records[index].uri for index in remote]
            fetched = pool.map(lambda uri: _attempt(paths.read_bytes, uri), uris)
            for index, blob in zip(remote, fetched, strict=True):
                blobs[index] = blob
    refused = [blob for blob in blobs if isinstance(blob, paths.RefusedError)]
    if refused and not any(_can_read(uri) for uri in _others(records, blobs, data)):
        raise refused[0]
    return blobs


def _others(
    records: Sequence[ImageRecord], blobs: Sequence[bytes | Exception], data: DataSection
) -> Iterator[str]:
    """At most OTHERS files of the source that were not refused, those that were just read first.

    Those are to be read once more: an outage can begin within one call.
    """
    files = [_file_of(record.uri) for record in records]
    pairs = list(zip(files, blobs, strict=True))
    read = dict.fromkeys(file for file, blob in pairs if isinstance(blob, bytes))
    refused = {file for file, blob in pairs if isinstance(blob, paths.RefusedError)}
    unread = (uri for uri in _source_files(data, refused) if uri not in refused)
    return itertools.islice(itertools.chain(read, unread), OTHERS)


def _source_files(data: DataSection, refused: set[str]) -> Iterator[str]:
    """The files of the source, or those that its list names."""
    if data.path is None:
        return
    root = source_root(data.path)
    by_name = data.format == "auto" and root.lower().endswith(LISTS)
    if data.format == "list" or (by_name and root not in refused):  # else Parquet of images
        yield from (record.uri for record in plan_list([root], data, Account(data.path)))
    else:
        yield from (file.uri for file in paths.list_files(data.path))


def _file_of(uri: str) -> str:
    match = _ROW.fullmatch(uri) or _RANGE.fullmatch(uri)
    return match[1] if match else uri


def _can_read(uri: str) -> bool:
    return isinstance(_attempt(_first_byte, uri), bytes)


def _first_byte(uri: str) -> bytes:
    with paths.open_input(uri) as file:
        content: bytes = file.read_at(1, 0)
    return content


def _source_filter(data: DataSection) -> Callable[[str], bool]:
    """Whether an address of a plan belongs to the source."""
    if data.path is None or data.format == "list":
        return lambda uri: True
    root = source_root(data.path)
    may_be_list = data.format == "auto" and root.lower().endswith(LISTS)

    def inside(uri: str) -> bool:
        path = _file_of(uri)
        below = path.startswith(f"{root}/") and "/../" not in path
        return below or path == root or (may_be_list and path == uri)

    return inside


def _attempt(read: Callable[[str], bytes], uri: str) -> bytes | Exception:
    try:
        return read(uri)
    except Exception as error:
        return _of_image(uri, error)


def _read_rows(
    uri: str,
    wanted: Sequence[tuple[int, int]],
    column: str,
    blobs: list[bytes | Exception],
    streams: RowStreams,
) -> None:
    try:
        with paths.open_input(uri) as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
            refuse_extensions(parquet.schema_arrow, [column], uri)
            metadata = parquet.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            ends = np.cumsum(counts)
            groups: dict[int, list[tuple[int, int]]] = {}
            for row, index in wanted:
                group = int(np.searchsorted(ends, row, side="right"))
                if group == len(ends):
                    blobs[index] = ImageError(
                        f"row {row} is gone: {uri} has {sum(counts)} rows now"
                    )
                else:
                    start = int(ends[group]) - counts[group]
                    groups.setdefault(group, []).append((row - start, index))
            for group, offsets in groups.items():
                if column_bytes(metadata, group, column) > LARGE_BYTES:
                    _stream_row_group(group, offsets, column, uri, blobs, streams)
                else:
                    _read_row_group(parquet, group, offsets, column, uri, blobs)
    except Exception as error:
        for _, index in wanted:
            blobs[index] = _of_image(uri, error)


def _stream_row_group(
    group: int,
    offsets: Sequence[tuple[int, int]],
    column: str,
    uri: str,
    blobs: list[bytes | Exception],
    streams: RowStreams,
) -> None:
    places = dict(offsets)
    for _, index in offsets:
        blobs[index] = ImageError("not read")
    try:
        for offset, value in streams.values(uri, group, column, list(places)):
            blobs[places.pop(offset)] = _cell_bytes(value, uri)
    except Exception as error:  # what was read before it stays
        for index in places.values():
            blobs[index] = _of_image(uri, error)


def _read_row_group(
    parquet: pq.ParquetFile,
    group: int,
    offsets: Sequence[tuple[int, int]],
    column: str,
    uri: str,
    blobs: list[bytes | Exception],
) -> None:
    try:
        values = parquet.read_row_group(group, columns=[column]).column(column)
    except Exception as error:
        for _, index in offsets:
            blobs[index] = _of_image(uri, error)
        return
    for offset, index in offsets:
        blobs[index] = _cell_bytes(values[offset].as_py(), uri)


def _cell_bytes(cell: Any, uri: str) -> bytes | Exception:
    if isinstance(cell, dict):
        # Hugging Face's Image: bytes where they are embedded, else a path beside the file.
        if cell.get("bytes") is None and cell.get("path"):
            try:
                address = beside(str(cell["path"]), parent(uri), uri)
            except ValueError as error:
                return error
            return _attempt(paths.read_bytes, address)
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else ImageError("no image in this row (null)")


def _read_ranges(
    uri: str, wanted: Sequence[tuple[int, int, int]], blobs: list[bytes | Exception]
) -> None:
    try:
        file = paths.open_input(uri)
    except Exception as error:
        for _, _, index in wanted:
            blobs[index] = _of_image(uri, error)
        return

    def read(place: tuple[int, int, int]) -> bytes | Exception:
        offset, size, _ = place
        try:
            content: bytes = file.read_at(size, offset)
        except Exception as error:
            return _of_image(uri, error)
        if len(content) < size:
            return ImageError(f"{len(content)} of {size} bytes at {offset} of {uri}")
        return content

    threads = min(THREADS, len(wanted)) if paths.is_remote(uri) else 1
    with file, ThreadPoolExecutor(threads) as pool:
        for (_, _, index), content in zip(wanted, pool.map(read, wanted), strict=True):
            blobs[index] = content


def _of_image(uri: str, error: Exception) -> Exception:
    """`error` in words where it is about the image read; else it is raised."""
    if is_damage(uri, error):
        return ImageError(f"{uri} is not readable Parquet: {error}")
    if isinstance(error, MemoryError | s3.S3SettingsError):
        raise error
    in_words = paths.storage_error("read", uri, error)
    if isinstance(in_words, paths.FileError | paths.RefusedError):
        return in_words
    raise in_words from None
