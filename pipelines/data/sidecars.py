"""What the files beside images say of them: metadata files and texts, as labels and captions.

As Hugging Face's imagefolder reads them: `metadata.jsonl`, `.csv` or `.parquet` with a column
`file_name` gives captions and labels to the files beside and below it. As caption tools write them:
`a.txt` captions `a.jpg`.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..config.sections import DataSection
from ..storage import paths, s3
from .account import Account
from .conventions import caption_column, captions_of, label_of
from .listing import ends_with
from .parquet_files import refuse_extensions
from .records import SourceError

TEXTS_AT_ONCE = 2**10
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Sidecars:
    """Captions and labels that sidecars give, by key of their image, and where they come from.

    `keys` are the images' and begin at the character `start` of their addresses. What cannot be
    read is lost in `account`.
    """

    def __init__(
        self, keys: pa.ChunkedArray, start: int, data: DataSection, account: Account
    ) -> None:
        self.captions: dict[str, tuple[str, ...]] = {}
        self.labels: dict[str, int | str] = {}
        self.captions_from: dict[str, None] = {}
        self.labels_from: dict[str, None] = {}
        self._keys, self._start = keys, start
        self._data, self._account = data, account

    def read(self, others: pa.ChunkedArray) -> pa.ChunkedArray:
        """Read the sidecars among the addresses `others`; those that are none remain."""
        return self._read_texts(self._read_metadata(others))

    def _read_metadata(self, others: pa.ChunkedArray) -> pa.ChunkedArray:
        """Take captions and labels of metadata files; the files that are none of these remain."""
        is_metadata = ends_with(others, [f"/{name}" for name in METADATA])
        files = others.filter(is_metadata).to_pylist()
        known = set(self._keys.to_pylist()) if files else set()
        strangers = 0
        for uri in files:
            folder = uri[self._start :].rpartition("/")[0]
            try:
                strangers += self._take_rows(uri, folder, known)
            except SourceError:
                raise
            except (ValueError, csv.Error, pa.ArrowException) as error:
                self._account.lose(uri, f"the metadata cannot be read: {error}")
        if strangers:
            self._account.unused.append(
                f"{strangers} rows of metadata for files that are not there"
            )
        return others.filter(pc.invert(is_metadata))

    def _take_rows(self, uri: str, folder: str, known: set[str]) -> int:
        """Take the rows of one metadata file; how many name a file that is not there."""
        strangers = 0
        columns: tuple[str | None, str | None, str] | None = None
        for where, row in _metadata_rows(uri, self._account):
            if columns is None:
                columns = _metadata_columns(list(row), self._data, uri)
                used = {name for name in columns if name}
                self._account.unused += [
                    f"column {name} of {uri}" for name in row if name not in used
                ]
            caption, label, file_name = columns
            key = posixpath.normpath(posixpath.join(folder, str(row.get(file_name))))
            if key not in known:
                strangers += 1
                continue
            try:
                if caption and (found := captions_of(row.get(caption))):
                    self.captions[key] = found
                    self.captions_from[f"{posixpath.basename(uri)}, column {caption}"] = None
                if label and (value := label_of(row.get(label))) is not None:
                    self.labels[key] = value
                    self.labels_from[f"{posixpath.basename(uri)}, column {label}"] = None
            except ValueError as error:
                self._account.lose(where, str(error))
        return strangers

    def _read_texts(self, others: pa.ChunkedArray) -> pa.ChunkedArray:
        """Take the captions of `a.txt` beside `a.jpg`; the files that are none of these remain."""
        if self._data.caption_column is None:
            return others
        is_text = ends_with(others, (".txt",))
        texts = others.filter(is_text)
        stems = pc.replace_substring_regex(self._keys, r"\.[^./]*$", "")
        text_stems = pc.replace_substring_regex(
            pc.utf8_slice_codeunits(texts, self._start), r"\.[^./]*$", ""
        )
        places = pc.index_in(stems, value_set=text_stems)  # of each image's text
        has_text = pc.is_valid(places)
        if not pc.any(has_text).as_py():
            return others
        images, places = self._keys.filter(has_text), places.drop_null()
        with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
            for start in range(0, len(images), TEXTS_AT_ONCE):
                keys = images.slice(start, TEXTS_AT_ONCE).to_pylist()
                uris = texts.take(places.slice(start, TEXTS_AT_ONCE)).to_pylist()
                contents = pool.map(paths.read_bytes, uris)
                for key, uri, content in zip(keys, uris, contents, strict=True):
                    self._take_text(key, uri, content)
        unused = np.ones(len(texts), bool)
        unused[places.to_numpy()] = False
        rest = texts.filter(pa.array(unused))
        return pa.chunked_array(
            [*others.filter(pc.invert(is_text)).chunks, *rest.chunks], pa.large_string()
        )

    def _take_text(self, key: str, uri: str, content: bytes) -> None:
        if key in self.captions:
            return
        try:
            found = captions_of(content.decode("utf-8-sig").strip())
        except UnicodeDecodeError as error:
            self._account.lose(uri, f"the caption is not UTF-8 text (byte {error.start})")
            return
        if found:
            self.captions[key] = found
            self.captions_from[".txt files beside the images"] = None


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
        lines = content.decode("utf-8-sig").split("\n")  # splitlines would split at U+2028 too
        for index, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("the line is no JSON object")
                yield f"{uri}, line {index}", row
            except ValueError as error:
                account.lose(f"{uri}, line {index}", str(error))
