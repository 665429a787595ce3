"""One Parquet file while planning: its footer, and its rows without the images.

What is damaged in it is told from a storage that fails. row_groups.py and reading.py read images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import paths
from .records import SourceError
from .row_groups import is_damage

FOOTER_READ = 2**16
"""Bytes of a Parquet file's end that are read at once, as Arrow does."""


class DamagedParquet(SourceError):
    """What a Parquet file holds cannot be read."""


def footer(uri: str) -> tuple[pq.FileMetaData, pa.Schema]:
    """The metadata and schema of `uri`. Raises DamagedParquet, and StorageError.

    Arrow has OSError for both, so the file's end is read before it is parsed.
    """
    try:
        with paths.open_input(uri) as file:
            end = _end_with_footer(file)
    except Exception as error:
        raise paths.storage_error("read", uri, error) from None
    try:
        with pq.ParquetFile(pa.BufferReader(end)) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedParquet(f"{uri} is not readable Parquet: {error}") from None


def parquet_columns(uri: str) -> list[str]:
    """Names of the columns of the Parquet file `uri`. Raises DamagedParquet for another file."""
    return list(footer(uri)[1].names)


def parquet_rows(uri: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of `uri` with these columns. Raises DamagedParquet, and StorageError."""
    try:
        with paths.open_input(uri) as file, pq.ParquetFile(file) as parquet:
            if not columns:
                yield from ({} for _ in range(parquet.metadata.num_rows))
                return
            for batch in parquet.iter_batches(batch_size=8192, columns=list(columns)):
                yield from batch.to_pylist()
    except MemoryError:
        raise
    except Exception as error:  # a client of the Hub raises what is no OSError
        if is_damage(uri, error):
            raise DamagedParquet(f"{uri} is not readable Parquet: {error}") from None
        raise paths.storage_error("read", uri, error) from None


def refuse_extensions(schema: pa.Schema, columns: Iterable[str], uri: str) -> None:
    """Values of Ray's type for Python objects unpickle, and so run, when they are looked at."""

    def extended(kind: pa.DataType) -> bool:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        if pa.types.is_dictionary(kind):
            inner.append(kind.value_type)
        return isinstance(kind, pa.BaseExtensionType) or any(map(extended, inner))

    for column in columns:
        if column in schema.names and extended(schema.field(column).type):
            raise SourceError(
                f"{uri}: column {column!r} is of the extension type "
                f"{schema.field(column).type}, which "
                "is not read from a source. Store bytes, strings and integers."
            )


def _end_with_footer(file: pa.NativeFile) -> bytes:
    """The end of a Parquet file, the footer in it: its length and PAR1 are the last eight bytes."""
    size = file.size()
    end: bytes = file.read_at(min(size, FOOTER_READ), max(size - FOOTER_READ, 0))
    length = int.from_bytes(end[-8:-4], "little") + 8
    if end.endswith(b"PAR1") and len(end) < length <= size:
        end = file.read_at(length, size - length)
    return end
