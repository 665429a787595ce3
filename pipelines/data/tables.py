"""Parquet files and lists (CSV or Parquet with an address column) to image records."""

from __future__ import annotations

import csv
import difflib
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..config.sections import DataSection
from ..storage import paths
from .listing import relative_path
from .records import ImageRecord, SourceError


def refuse_extensions(schema: pa.Schema, columns: Sequence[str], uri: str) -> None:
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


def parent(uri: str) -> str:
    """The folder of `uri`."""
    return uri.rpartition("/")[0]


def beside(given: str, folder: str, where: str) -> str:
    """The address of the relative path `given` in `folder`; it may not leave that folder."""
    path = posixpath.normpath(given)
    address = paths.join(folder, path)
    leaves = path == ".." or path.startswith(("../", "/")) or "://" in given
    if not leaves and not paths.is_s3(folder):
        root = os.path.realpath(folder).rstrip("/")
        leaves = not os.path.realpath(address).startswith(f"{root}/")
    if leaves:
        raise SourceError(
            f"{where}: {given!r} leaves {folder}. Give an absolute path in a list instead."
        )
    return address


def plan_parquet(uris: Sequence[str], data: DataSection) -> Iterator[ImageRecord]:
    for uri in uris:
        if not uri.lower().endswith(".parquet"):
            continue
        _require(data.image_column, "image_column", parquet_schema(uri).names, uri)
        relative = relative_path(uri, str(data.path))
        for row, values in enumerate(_parquet_rows(uri, _wanted(data), data)):
            where = f"{uri}, row {row}"
            key = f"{relative}#{row:08d}" if data.key_column is None else _key(values, data, where)
            yield make_record(key, f"{uri}#row={row}", values, data, where)


def plan_list(uris: Sequence[str], data: DataSection) -> Iterator[ImageRecord]:
    if len(uris) != 1 or not uris[0].lower().endswith((".csv", ".parquet")):
        raise SourceError(
            f"data.path={data.path!r}: a list is one .csv or .parquet file, not {len(uris)} files."
        )
    uri = uris[0]
    read = _csv_rows if uri.lower().endswith(".csv") else _parquet_rows
    for row, values in enumerate(read(uri, [data.uri_column, *_wanted(data)], data)):
        where = f"{uri}, row {row}"
        given = values.get(data.uri_column)
        if not given:
            raise SourceError(f"{where}: no value in column {data.uri_column!r}.")
        address = _resolve(str(given), parent(uri), where)
        key = str(given) if data.key_column is None else _key(values, data, where)
        yield make_record(key, address, values, data, where)


def _wanted(data: DataSection) -> list[str]:
    columns = (data.key_column, data.label_column, data.caption_column)
    return [column for column in columns if column is not None]


def _check_columns(
    names: Sequence[str], wanted: Sequence[str], data: DataSection, uri: str
) -> list[str]:
    """Those of `wanted` that are there; only label and caption of default name may be absent."""
    for field in ("uri_column", "key_column", "label_column", "caption_column"):
        column = getattr(data, field)
        default = DataSection.model_fields[field].default
        optional = field in ("label_column", "caption_column") and column == default
        if column in wanted and not optional:
            _require(column, field, names, uri)
    return [column for column in dict.fromkeys(wanted) if column in names]


def _require(column: str, field: str, names: Sequence[str], uri: str) -> None:
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SourceError(
            f"{uri} has no column {column!r} (data.{field}).{hint} It has: {', '.join(names)}."
        )


def parquet_schema(uri: str) -> pa.Schema:
    try:
        with paths.open_input(uri) as file:
            return pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{uri} is not readable Parquet: {error}") from None


def _parquet_rows(uri: str, wanted: Sequence[str], data: DataSection) -> Iterator[dict[str, Any]]:
    schema = parquet_schema(uri)
    columns = _check_columns(schema.names, wanted, data, uri)
    refuse_extensions(schema, columns, uri)
    with paths.open_input(uri) as file, pq.ParquetFile(file) as parquet:
        if not columns:
            yield from ({} for _ in range(parquet.metadata.num_rows))
            return
        for batch in parquet.iter_batches(batch_size=8192, columns=columns):
            yield from batch.to_pylist()


def _csv_rows(uri: str, wanted: Sequence[str], data: DataSection) -> Iterator[dict[str, Any]]:
    try:
        text = paths.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri} is not UTF-8 text (byte {error.start}).") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = _check_columns(list(reader.fieldnames or []), wanted, data, uri)
    for row in reader:
        yield {column: row[column] or None for column in columns}


def _key(values: dict[str, Any], data: DataSection, where: str) -> str:
    key = values.get(str(data.key_column))
    if key is None or key == "":
        raise SourceError(f"{where}: no value in column {data.key_column!r} (data.key_column).")
    return str(key)


def make_record(
    key: str, uri: str, values: dict[str, Any], data: DataSection, where: str
) -> ImageRecord:
    caption = values.get(data.caption_column) if data.caption_column else None
    label = values.get(data.label_column) if data.label_column else None
    return ImageRecord(key, uri, _label(label, where), None if caption is None else str(caption))


def _label(value: Any, where: str) -> int | None:
    # pandas turns a column of integers with gaps into floats; NaN is its gap.
    if value is None or value == "" or value != value:
        return None
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise SourceError(
            f"{where}: the label {value!r} is not an integer. Number the classes, or set "
            "data.label_column=null."
        ) from None
    return number


def _resolve(given: str, folder: str, where: str) -> str:
    """The address `given` by a file in `folder`; a relative one may not leave that folder."""
    scheme, separator, _ = given.partition("://")
    if separator and scheme.isalnum():
        if scheme not in ("s3", "file"):
            raise SourceError(f"{where}: {given!r} is neither a path nor s3://. Download it first.")
        return given.removeprefix("file://")
    if given.startswith("/"):
        return given
    return beside(given, folder, where)
