"""Rows of large Parquet row groups, streamed: read once in order, in memory that does not grow.

pandas and pyarrow write a million rows into one row group unless they are told otherwise, and
Parquet has no way to one row in its middle. A small group is read whole (reading.py); of a large
one only some pages are in memory, and whoever asks for its rows in order reads it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import paths

LARGE_BYTES = 64 << 20
"""Bytes of the image column, decompressed, above which a row group is streamed."""
STREAM_ROWS = 64
BUFFER_BYTES = 4 << 20


def column_bytes(metadata: pq.FileMetaData, group: int, column: str) -> int:
    """Decompressed bytes of `column`, with the columns inside it, in row group `group`."""
    found = metadata.row_group(group)
    chunks = (found.column(i) for i in range(found.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] == column
    )


def is_damage(uri: str, error: Exception) -> bool:
    """Whether `error` is of what the Parquet file `uri` holds, not of reading it.

    Arrow raises OSError for some damage, with no errno, as for every failed request to S3.
    """
    arrows = type(error) is OSError and error.errno is None
    of_s3 = uri.startswith("s3://") and "AWS Error" in str(error)
    unreadable = isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError)
    return unreadable or (arrows and not of_s3)


class RowStreams:
    """Large row groups that are open for reading, each at its own place."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], _Stream] = {}
        self._damaged: dict[tuple[str, int], tuple[int, str]] = {}
        """By (file, row group): the first row that cannot be read, and why."""

    def __enter__(self) -> RowStreams:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def values(
        self, uri: str, group: int, column: str, offsets: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """(offset, value as Python has it) of the rows at `offsets` of the group, ascending.

        Rows before those that were asked for last make the group be read from its beginning again,
        and so does a read that failed. Raises pa.ArrowInvalid for damaged rows and all behind them,
        which are read only once, and OSError.
        """
        stream = self._open.get((uri, group))
        for offset in sorted(offsets):
            first_damaged, message = self._damaged.get((uri, group), (offset + 1, ""))
            if offset >= first_damaged:
                raise pa.ArrowInvalid(message)
            if stream is None or offset < stream.start:
                if stream is not None:
                    stream.close()
                # Whoever reads in order is done with the groups before.
                for old in [key for key in self._open if key[0] == uri]:
                    self._open.pop(old).close()
                stream = self._open[uri, group] = _Stream(uri, group, column)
            try:
                value = stream.value(offset)
            except Exception as error:  # the stream has lost its place
                if is_damage(uri, error):
                    self._damaged[uri, group] = stream.start, str(error)
                self._open.pop((uri, group)).close()
                raise
            yield offset, value


class _Stream:
    """One column of one row group, a few rows at a time."""

    def __init__(self, uri: str, group: int, column: str) -> None:
        self.file = paths.open_input(uri)
        self.parquet = pq.ParquetFile(self.file, pre_buffer=False, buffer_size=BUFFER_BYTES)
        self.batches = self.parquet.iter_batches(
            batch_size=STREAM_ROWS, row_groups=[group], columns=[column], use_threads=False
        )
        self.group = group
        self.start = 0
        self.rows: pa.Array = pa.nulls(0)

    def value(self, offset: int) -> Any:
        while offset >= self.start + len(self.rows):
            self.start += len(self.rows)
            self.rows = pa.nulls(0)
            batch = next(self.batches, None)
            if batch is None:
                raise pa.ArrowInvalid(
                    f"row group {self.group} has {self.start} rows, fewer than its footer says"
                )
            self.rows = batch.column(0)
        return self.rows[offset - self.start].as_py()

    def close(self) -> None:
        self.parquet.close()
        self.file.close()
