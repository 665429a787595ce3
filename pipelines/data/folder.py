"""A folder of images: its files by name, labels from class folders, captions and labels from
sidecars.

As torchvision's ImageFolder and Hugging Face's imagefolder read it: the first folder of a path is
the class; `metadata.jsonl`, `.csv` or `.parquet` with a column `file_name` gives captions and
labels to the files beside and below it; `a.txt` captions `a.jpg`.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..config.sections import DataSection
from ..storage import paths, s3
from .account import Account
from .conventions import caption_column, captions_of, label_of, number_labels
from .listing import ends_with, relative_path
from .records import IMAGE_SUFFIXES, RECORDS, SourceError
from .tables import refuse_extensions

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NOT_AN_IMAGE = "not an image by its name (data.suffixes)"
NO_SUFFIX = "no suffix (data.suffixes=[''] takes such files)"
UNSUPPORTED = {
    (".heic", ".heif"): "HEIC, which Pillow does not read (convert with the package pillow-heif)",
    (".jxl",): "JPEG XL, which Pillow does not read (convert with the package pillow-jxl-plugin)",
}


@dataclass
class _Given:
    """What sidecars say of images, by key."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: dict[str, int | str] = field(default_factory=dict)
    captions_from: list[str] = field(default_factory=list)
    labels_from: list[str] = field(default_factory=list)


def plan_folder(uris: pa.ChunkedArray, data: DataSection, account: Account) -> pa.Table:
    """The images among `uris` with labels and captions, in key order; columns RECORDS."""
    is_image = _named_as_images(uris, data)
    images, others = uris.filter(is_image), uris.filter(pc.invert(is_image))
    if not len(images):
        _count_others(others, account)
        return RECORDS.empty_table()
    first = images[0].as_py()
    # All begin with the same folder, so keys are in the order of the addresses.
    start = len(first) - len(relative_path(first, str(data.path)))
    keys = pc.utf8_slice_codeunits(images, start)
    given = _Given()
    others = _read_metadata(others, keys, start, data, account, given)
    others = _read_texts(others, keys, start, data, account, given)
    _count_others(others, account)
    labels = _labels(keys, data, account, given)
    captions, several = _captions(keys, account, given)
    return pa.table([keys, images, labels, captions, several], schema=RECORDS)


def _named_as_images(uris: pa.ChunkedArray, data: DataSection) -> pa.ChunkedArray:
    suffixes = IMAGE_SUFFIXES if data.suffixes is None else data.suffixes
    named = [suffix for suffix in suffixes if suffix]
    found = ends_with(uris, named) if named else pc.equal(uris, "")
    if "" in suffixes:
        found = pc.or_(found, pc.invert(pc.match_substring_regex(uris, r"\.[^./]*$")))
    return found


def _count_others(others: pa.ChunkedArray, account: Account) -> None:
    for suffixes, reason in UNSUPPORTED.items():
        matches = ends_with(others, suffixes)
        _count(others.filter(matches), reason, account)
        others = others.filter(pc.invert(matches))
    has_suffix = pc.match_substring_regex(others, r"\.[^./]*$")
    _count(others.filter(pc.invert(has_suffix)), NO_SUFFIX, account)
    _count(others.filter(has_suffix), NOT_AN_IMAGE, account)


def _count(uris: pa.ChunkedArray, reason: str, account: Account) -> None:
    if len(uris):
        account.skip(reason, uris[0].as_py(), len(uris))


def _labels(
    keys: pa.ChunkedArray, data: DataSection, account: Account, given: _Given
) -> pa.ChunkedArray:
    if data.label_column is None:
        return pa.chunked_array([pa.nulls(len(keys), pa.int64())])
    if given.labels:
        texts = [None if v is None else str(v) for v in map(given.labels.get, keys.to_pylist())]
        account.labels_from = ", ".join(given.labels_from)
        named = pa.chunked_array([pa.array(texts, pa.large_string())])
    else:
        account.labels_from = "class folders"
        in_folder = pc.match_substring(keys, "/")
        folders = pc.replace_substring_regex(keys, "(?s)/.*", "")
        named = pc.if_else(in_folder, folders, pa.scalar(None, pa.large_string()))
        names = sorted(pc.unique(named).drop_null().to_pylist())
        account.class_names = names
        return pc.index_in(named, value_set=pa.array(names, pa.large_string())).cast(pa.int64())
    numbers, account.class_names = number_labels(named, str(data.path))
    return numbers


def _captions(keys: pa.ChunkedArray, account: Account, given: _Given) -> tuple[pa.Array, pa.Array]:
    several_type = RECORDS.field("captions").type
    if not given.captions:
        return pa.nulls(len(keys), pa.large_string()), pa.nulls(len(keys), several_type)
    account.captions_from = ", ".join(dict.fromkeys(given.captions_from))
    of_image = [given.captions.get(key, ()) for key in keys.to_pylist()]
    first = pa.array([texts[0] if texts else None for texts in of_image], pa.large_string())
    several = pa.array([list(t) if len(t) > 1 else None for t in of_image], several_type)
    return first, several


def _read_texts(
    others: pa.ChunkedArray,
    keys: pa.ChunkedArray,
    start: int,
    data: DataSection,
    account: Account,
    given: _Given,
) -> pa.ChunkedArray:
    """Take the captions of `a.txt` beside `a.jpg`; the files that are none of these remain."""
    if data.caption_column is None:
        return others
    is_text = ends_with(others, (".txt",))
    texts = others.filter(is_text)
    stems = pc.replace_substring_regex(keys, r"\.[^./]*$", "")
    text_stems = pc.replace_substring_regex(pc.utf8_slice_codeunits(texts, start), r"\.[^./]*$", "")
    places = pc.index_in(text_stems, value_set=stems)
    beside = pc.is_valid(places)
    if not pc.any(beside).as_py():
        return others
    used = texts.filter(beside)
    of_image = keys.take(places.drop_null()).to_pylist()
    with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
        for key, uri, content in zip(
            of_image, used.to_pylist(), pool.map(paths.read_bytes, used.to_pylist()), strict=True
        ):
            if key in given.captions:
                continue
            try:
                found = captions_of(content.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                account.lose(uri, f"the caption is not UTF-8 text (byte {error.start})")
                continue
            if found:
                given.captions[key] = found
                given.captions_from.append(".txt files beside the images")
    rest = texts.filter(pc.invert(beside))
    return pa.chunked_array(
        [*others.filter(pc.invert(is_text)).chunks, *rest.chunks], pa.large_string()
    )


def _read_metadata(
    others: pa.ChunkedArray,
    keys: pa.ChunkedArray,
    start: int,
    data: DataSection,
    account: Account,
    given: _Given,
) -> pa.ChunkedArray:
    """Take captions and labels of metadata files; the files that are none of these remain."""
    is_metadata = ends_with(others, [f"/{name}" for name in METADATA])
    files = others.filter(is_metadata).to_pylist()
    known = set(keys.to_pylist()) if files else set()
    strangers = 0
    for uri in files:
        folder = uri[start:].rpartition("/")[0]
        try:
            strangers += _take_rows(uri, folder, known, data, account, given)
        except (SourceError, UnicodeDecodeError, ValueError, pa.ArrowException) as error:
            if isinstance(error, SourceError):
                raise
            account.lose(uri, f"the metadata cannot be read: {error}")
    if strangers:
        account.unused.append(f"{strangers} rows of metadata for files that are not there")
    return others.filter(pc.invert(is_metadata))


def _take_rows(
    uri: str, folder: str, known: set[str], data: DataSection, account: Account, given: _Given
) -> int:
    """Take the rows of one metadata file; how many name a file that is not there."""
    strangers = 0
    columns: tuple[str | None, str | None, str] | None = None
    for where, row in _metadata_rows(uri, account):
        if columns is None:
            columns = _metadata_columns(list(row), data, uri)
            used = {name for name in columns if name}
            account.unused += [f"column {name} of {uri}" for name in row if name not in used]
        caption, label, file_name = columns
        key = posixpath.normpath(posixpath.join(folder, str(row.get(file_name))))
        if key not in known:
            strangers += 1
            continue
        try:
            if caption and (found := captions_of(row.get(caption))):
                given.captions[key] = found
                given.captions_from.append(f"{posixpath.basename(uri)}, column {caption}")
            if label and (value := label_of(row.get(label))) is not None:
                given.labels[key] = value
                given.labels_from = [f"{posixpath.basename(uri)}, column {label}"]
        except ValueError as error:
            account.lose(where, str(error))
    return strangers


def _metadata_columns(
    names: Sequence[str], data: DataSection, uri: str
) -> tuple[str | None, str | None, str]:
    """(caption, label, file name): the columns of a metadata file."""
    files = [n for n in names if n == "file_name" or n.endswith("_file_name")]
    if len(files) != 1:
        raise SourceError(
            f"{uri}: {'no' if not files else 'more than one'} column names the files. Expected "
            f"file_name (or one that ends in _file_name); it has: {', '.join(names)}."
        )
    label = data.label_column if data.label_column in names else None
    return caption_column(names, data, uri), label, files[0]


def _metadata_rows(uri: str, account: Account) -> Iterator[tuple[str, dict[str, Any]]]:
    content = paths.read_bytes(uri)
    if uri.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(content))
        refuse_extensions(table.schema, table.column_names, uri)
        for index, row in enumerate(table.to_pylist()):
            yield f"{uri}, row {index}", row
    elif uri.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        for index, row in enumerate(reader):
            yield f"{uri}, row {index}", row
    else:
        for index, line in enumerate(content.decode("utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("the line is no JSON object")
                yield f"{uri}, line {index}", row
            except ValueError as error:
                account.lose(f"{uri}, line {index}", str(error))
