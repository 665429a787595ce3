"""Parquet files of images, and lists of addresses (CSV, TSV, JSON lines, Parquet), to image
records."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from ..config.sections import DataSection
from ..storage import paths
from .account import Account
from .conventions import caption_column, captions_of, label_of
from .listing import relative_path
from .parquet_files import DamagedParquet, footer, parquet_rows, refuse_extensions
from .records import ImageRecord, SourceError
from .row_groups import LARGE_BYTES, column_bytes

LISTS = (".csv", ".tsv", ".jsonl", ".parquet")
NOT_PARQUET = "not a .parquet file"
TABLE_FORMAT = "part of a table format's bookkeeping (a name that begins with _)"
_PARTITION = re.compile(r"([^/=]+)=([^/]*)")

Values = dict[str, Any]


def plan_parquet(
    uris: Sequence[str],
    data: DataSection,
    account: Account,
    large_groups: dict[str, dict[int, tuple[int, int]]],
) -> Iterator[ImageRecord]:
    """The rows of the Parquet files among `uris`. A damaged file is a recorded loss, and so are the
    rows from a damaged page of labels or captions on.

    Notes the large row groups of each file, and their rows, in `large_groups`.

    Raises StorageError where the storage fails, and SourceError for Delta and Iceberg tables, whose
    Parquet files are not all of the table, and for columns that cannot serve.
    """
    num_planned = 0
    for uri in _table_files(uris, data, account):
        num_rows, num_read = 1, 0
        try:
            metadata, schema = footer(uri)
            num_rows = metadata.num_rows
            if large := _large_groups(metadata, data.image_column):
                large_groups[uri] = large
            for record in _image_rows(uri, schema, data, account):
                yield record
                num_read += 1
        except DamagedParquet as error:
            rest = f" ({num_rows - num_read} of its {num_rows} rows)" if num_read else ""
            account.lose(uri, f"{error}{rest}")
            account.lost_files += (num_rows - num_read) / max(num_rows, 1)
        num_planned += num_read
    if account.num_losses and not num_planned:
        raise SourceError(account.losses[0]["message"])


def plan_list(uris: Sequence[str], data: DataSection, account: Account) -> Iterator[ImageRecord]:
    """The images that a list names. Raises SourceError."""
    if len(uris) != 1 or not uris[0].lower().endswith(LISTS):
        raise SourceError(
            f"data.path={data.path!r}: a list is one {', '.join(LISTS[:-1])} or .parquet file, not "
            f"{len(uris)} files."
        )
    uri = uris[0]
    names, rows = _list_rows(uri)
    _require(data.uri_column, "uri_column", names, uri)
    columns = _Columns(names, data, account, uri, {data.uri_column})
    for row, values in enumerate(rows(columns.wanted)):
        where = f"{uri}, row {row}"
        given = values.get(data.uri_column)
        if not given:
            raise SourceError(f"{where}: no value in column {data.uri_column!r}.")
        address = _resolve(str(given), parent(uri), where)
        yield columns.record(str(given), address, values, where)


def parent(uri: str) -> str:
    """The folder of `uri`."""
    return uri.rpartition("/")[0]


def beside(given: str, folder: str, where: str) -> str:
    """The address of the relative path `given` in `folder`; it may not leave that folder."""
    path = posixpath.normpath(given)
    address = paths.join(folder, path)
    leaves = path == ".." or path.startswith(("../", "/")) or "://" in given
    if not leaves and not paths.is_remote(folder):
        root = os.path.realpath(folder).rstrip("/")
        leaves = not os.path.realpath(address).startswith(f"{root}/")
    if leaves:
        raise SourceError(
            f"{where}: {given!r} leaves {folder}. Give an absolute path in a list instead."
        )
    return address


class _Columns:
    """Which columns of a table are key, label and caption; makes records of its rows."""

    def __init__(
        self, names: Sequence[str], data: DataSection, account: Account, uri: str, used: set[str]
    ) -> None:
        self.account = account
        self.key = data.key_column
        if self.key is not None:
            _require(self.key, "key_column", names, uri)
        self.label = data.label_column
        if self.label is not None and self.label not in names:
            if self.label != DataSection.model_fields["label_column"].default:
                _require(self.label, "label_column", names, uri)
            self.label = None
        self.caption = caption_column(names, data, uri)
        known = {name for name in (self.key, self.label, self.caption) if name is not None}
        self.wanted = [name for name in names if name in known | used]
        for name in names:
            note = f"column {name}"
            if name not in known | used and note not in account.unused:
                account.unused.append(note)
        if self.label:
            account.labels_from = f"column {self.label}"
        if self.caption:
            account.captions_from = f"column {self.caption}"

    def record(self, key: str, uri: str, values: Values, where: str) -> ImageRecord:
        """The row's record; `key` names it where no column does. Raises SourceError."""
        if self.key is not None:
            found = values.get(self.key)
            if found is None or found == "":
                raise SourceError(f"{where}: no value in column {self.key!r} (data.key_column).")
            key = str(found)
        label = values.get(self.label) if self.label else None
        caption = values.get(self.caption) if self.caption else None
        return make_record(key, uri, label, caption, where, self.account)


def make_record(
    key: str, uri: str, label: Any, caption: Any, where: str, account: Account
) -> ImageRecord:
    """One image's record; a label or caption that cannot be one is lost, and the image is not."""
    number: Any = None
    captions: tuple[str, ...] = ()
    try:
        number = label_of(label)
    except ValueError as error:
        account.lose(where, str(error))
    try:
        captions = captions_of(caption)
    except ValueError as error:
        account.lose(where, str(error))
    several = captions if len(captions) > 1 else None
    return ImageRecord(key, uri, number, captions[0] if captions else None, several)


def _table_files(uris: Sequence[str], data: DataSection, account: Account) -> Iterator[str]:
    path = str(data.path)
    for uri in uris:
        parts = relative_path(uri, path).split("/")
        if "_delta_log" in parts:
            raise SourceError(
                f"data.path={path!r} is a Delta table, some of whose Parquet files may be deleted "
                "rows. Export it (deltalake: DeltaTable(path).to_pyarrow_dataset()) first."
            )
        if parts[0] == "metadata" and parts[-1].endswith(".metadata.json"):
            raise SourceError(
                f"data.path={path!r} is an Iceberg table, some of whose Parquet files may be "
                "deleted rows. Export it (pyiceberg: table.scan().to_arrow()) first."
            )
        if len(uris) > 1 and any(part.startswith("_") for part in parts):
            account.skip(TABLE_FORMAT, uri)
        elif not uri.lower().endswith(".parquet"):
            account.skip(NOT_PARQUET, uri)
        else:
            yield uri


def _image_rows(
    uri: str, schema: pa.Schema, data: DataSection, account: Account
) -> Iterator[ImageRecord]:
    _require(data.image_column, "image_column", schema.names, uri)
    _refuse_other_than_images(schema, data, uri)
    relative = relative_path(uri, str(data.path))
    partitions = dict(_PARTITION.findall(parent(relative)))
    names = [*schema.names, *(name for name in partitions if name not in schema.names)]
    columns = _Columns(names, data, account, uri, {data.image_column})
    wanted = [n for n in columns.wanted if n in schema.names and n != data.image_column]
    refuse_extensions(schema, wanted, uri)
    class_names = _class_names(schema, columns.label)
    if class_names:
        if account.class_names not in ([], class_names):
            raise SourceError(
                f"{uri}: the classes of column {columns.label!r} are others than in the files "
                f"before ({_first_difference(account.class_names, class_names)}). Read the parts "
                "of one data set, or set data.label_column=null."
            )
        account.class_names = class_names
        account.labels_from = f"column {columns.label} (ClassLabel)"
    shared = {name: unquote(value) for name, value in partitions.items()}
    for row, values in enumerate(parquet_rows(uri, wanted)):
        yield columns.record(
            f"{relative}#{row:08d}", f"{uri}#row={row}", shared | values, f"{uri}, row {row}"
        )


def _refuse_other_than_images(schema: pa.Schema, data: DataSection, uri: str) -> None:
    """Raises SourceError where the image column holds neither bytes nor Hugging Face's struct."""
    refuse_extensions(schema, [data.image_column], uri)
    if _holds_images(schema.field(data.image_column).type):
        return
    fitting = [field.name for field in schema if _holds_images(field.type)]
    advice = f" {' and '.join(fitting)} would fit: set data.image_column." if fitting else ""
    raise SourceError(
        f"{uri}: column {data.image_column!r} is {schema.field(data.image_column).type}; expected "
        f"the encoded bytes of an image, or Hugging Face's struct<bytes, path>.{advice}"
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in (*binary, pa.types.is_binary_view, pa.types.is_null))


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    """The names of a column of Hugging Face's type ClassLabel, which they keep in the metadata."""
    try:
        text = (schema.metadata or {})[b"huggingface"]
        names = json.loads(text)["info"]["features"][label]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return []


def _first_difference(before: Sequence[str], now: Sequence[str]) -> str:
    pairs = enumerate(zip_longest(before, now))
    number, (first, second) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
    return f"{number} was {first!r} and is {second!r}"


def _require(column: str, field: str, names: Sequence[str], uri: str) -> None:
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SourceError(
            f"{uri} has no column {column!r} (data.{field}).{hint} It has: {', '.join(names)}."
        )


def _large_groups(metadata: pq.FileMetaData, column: str) -> dict[int, tuple[int, int]]:
    found, start = {}, 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if column_bytes(metadata, group, column) > LARGE_BYTES:
            found[group] = (start, stop)
        start = stop
    return found


def _list_rows(uri: str) -> tuple[list[str], Callable[[Sequence[str]], Iterator[Values]]]:
    """(column names, a function that gives the rows with some columns) of a list."""
    suffix = uri.lower().rpartition(".")[2]
    if suffix == "parquet":
        _, schema = footer(uri)

        def rows(columns: Sequence[str]) -> Iterator[Values]:
            refuse_extensions(schema, columns, uri)
            return parquet_rows(uri, columns)

        return list(schema.names), rows
    try:
        text = paths.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri} is not UTF-8 text (byte {error.start}).") from None
    if suffix == "jsonl":
        lines = text.split("\n")  # splitlines would split at U+2028 too
        objects = [_json_object(line, uri, n) for n, line in enumerate(lines, 1) if line.strip()]
        names = list(dict.fromkeys(name for found in objects for name in found))
        return names, lambda columns: iter(objects)
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if suffix == "tsv" else ","
    )

    def csv_rows(columns: Sequence[str]) -> Iterator[Values]:
        with _csv_explained(reader, uri):
            yield from ({column: row[column] or None for column in columns} for row in reader)

    with _csv_explained(reader, uri):
        return list(reader.fieldnames or []), csv_rows


@contextlib.contextmanager
def _csv_explained(reader: csv.DictReader[str], uri: str) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        line = reader.line_num + 1
        raise SourceError(
            f"{uri}, line {line}: {error}. Is a quotation mark missing? (A list in JSON lines, "
            ".jsonl, has texts of any length.)"
        ) from None


def _json_object(line: str, uri: str, number: int) -> Values:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{uri}, line {number} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{uri}, line {number} is no JSON object.")
    return found


def _resolve(given: str, folder: str, where: str) -> str:
    """The address `given` by a file in `folder`; a relative one may not leave that folder."""
    scheme, separator, rest = given.partition("://")
    if separator and scheme.isalnum():
        if scheme not in ("s3", "hf", "file"):
            raise SourceError(
                f"{where}: {given!r} is neither a path nor s3:// or hf://. Download it first."
            )
        # RFC 8089: a file URI is percent-encoded, and its host is empty or localhost.
        return given if scheme != "file" else unquote(rest.removeprefix("localhost"))
    if given.startswith("/"):
        return given
    return beside(given, folder, where)
