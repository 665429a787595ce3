"""Image sources to planned records to uint8 crops: folders, Parquet, WebDataset shards, lists.

`plan_images` lists a source as an Arrow table (no pixels are read), `read_records` fetches encoded bytes,
`decode_image` makes ADM's centre crop from them. Plain functions without Ray, local or on S3; `precompute.py` and
`train_autoencoder.py` run them in Ray Data.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from fae_core.errors import UserError
from pipelines import s3, storage
from pipelines.config import DataSection

# decode_image holds the recipe's limit; Pillow's own fixed one would refuse before it.
Image.MAX_IMAGE_PIXELS = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WEBDATASET_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
THREADS = s3.CONNECTIONS
TAR_READ_AHEAD = 2**18
ROWS_AT_ONCE = 2**16
RECORDS = pa.schema(
    [
        ("key", pa.large_string()),
        ("uri", pa.large_string()),
        ("label", pa.int64()),
        ("caption", pa.large_string()),
    ]
)
"""A plan in memory: columns, because ten million records as Python objects take several times as much."""

_ROW = re.compile(r"(.+)#row=(\d+)")
_RANGE = re.compile(r"(.+)#offset=(\d+)&size=(\d+)")

T = TypeVar("T")


class SourceError(UserError, ValueError):
    """A source that cannot be planned; the message is for the person who named it."""


class ImageError(ValueError):
    """One image that cannot be read or decoded; the message is the same on every machine."""


@dataclass(frozen=True)
class ImageRecord:
    """One planned image; `uri` is FILE, FILE#row=N (Parquet) or FILE#offset=O&size=S (tar)."""

    key: str
    uri: str
    label: int | None = None
    caption: str | None = None


def plan_images(data: DataSection) -> pa.Table:
    """The images of `data.path` in key order, the first `data.limit` of them, with the columns RECORDS.

    No pixels are read. Raises SourceError for a missing path, an empty source, an unknown column, a repeated key.
    """
    if not data.path:
        raise SourceError("data.path is not set. Give a folder, a file or an s3:// prefix.")
    uris = _listing(data.path)
    if not len(uris) and not storage.exists(data.path):
        raise SourceError(f"data.path={data.path!r} does not exist.")
    source_format = _detect(uris, data) if data.format == "auto" else data.format
    if source_format == "folder":
        table = _plan_folder(uris, data)
    else:
        plan = {"parquet": _plan_parquet, "webdataset": _plan_tar, "list": _plan_list}[
            source_format
        ]
        table = _in_order(records_table(plan(uris.to_pylist(), data)), "key", "uri")
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


def records_table(records: Iterable[ImageRecord]) -> pa.Table:
    """`records` as columns; an iterator is taken in as it goes, never held whole as objects."""
    batches = []
    for some in batched(records, ROWS_AT_ONCE):
        try:
            columns = [[getattr(record, name) for record in some] for name in RECORDS.names]
            batches.append(pa.record_batch(columns, schema=RECORDS))
        except UnicodeEncodeError:
            for record in some:
                _check_text(record.key, record.uri, record.caption or "")
            raise
    return pa.Table.from_batches(batches, schema=RECORDS)


def records_of(table: pa.Table) -> list[ImageRecord]:
    """The rows of a table with the columns RECORDS."""
    return [ImageRecord(**row) for row in table.select(RECORDS.names).cast(RECORDS).to_pylist()]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some


def read_records(records: Sequence[ImageRecord], data: DataSection) -> list[bytes | Exception]:
    """The encoded bytes of each record, or the exception of one that cannot be read.

    Rows of one Parquet file are read together, one row group at a time and only the image column;
    ranges of one tar file share one open file; objects and ranges on S3 are fetched by THREADS threads.
    What lies outside `data.path` is not read, whatever a plan says; only a list names places elsewhere.
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
        elif record.uri.startswith("s3://"):
            remote.append(index)
        else:
            blobs[index] = _attempt(storage.read_bytes, record.uri)
    for uri, wanted_rows in rows.items():
        _read_rows(uri, wanted_rows, data.image_column, blobs)
    for uri, wanted_ranges in ranges.items():
        _read_ranges(uri, sorted(wanted_ranges), blobs)
    if remote:
        with ThreadPoolExecutor(min(THREADS, len(remote))) as pool:
            uris = [records[index].uri for index in remote]
            fetched = pool.map(lambda uri: _attempt(storage.read_bytes, uri), uris)
            for index, blob in zip(remote, fetched, strict=True):
                blobs[index] = blob
    return blobs


def decode_records(
    records: Sequence[ImageRecord], blobs: Sequence[bytes | Exception], size: int, max_pixels: int
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Crops uint8 [n, size, size, 3], their indices in `records`, and the others' errors.

    An error is key, stage, message; the stage is `read` or `decode`. A message is the
    same on every machine and every run.
    """
    crops: list[np.ndarray] = []
    kept: list[int] = []
    errors: list[dict[str, str]] = []
    for index, (record, blob) in enumerate(zip(records, blobs, strict=True)):
        if isinstance(blob, Exception):
            errors.append({"key": record.key, "stage": "read", "message": _message(blob)})
            continue
        try:
            crops.append(decode_image(blob, size, max_pixels))
            kept.append(index)
        except ImageError as error:
            errors.append({"key": record.key, "stage": "decode", "message": _message(error)})
    images = np.stack(crops) if crops else np.empty((0, size, size, 3), np.uint8)
    return images, kept, errors


def decode_image(data: bytes, size: int, max_pixels: int) -> np.ndarray:
    """ADM's centre crop uint8 [size, size, 3] of one encoded image. Raises ImageError.

    The declared size is held against `max_pixels` before a pixel is decoded. EXIF rotation is
    applied, an animation gives its first frame, transparency lies on white, 16-bit grey is
    scaled (v/257); of 16-bit colour Pillow itself keeps the high byte.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{width}x{height} = {width * height} pixels, over data.max_pixels={max_pixels}"
                )
            image.load()
            rgb = _to_rgb(_upright(image))
        _check_aspect(*rgb.size, size, max_pixels)
        return adm_center_crop(rgb, size)
    except ImageError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ImageError(f"not an image ({kinds}): it begins with {data[:12]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged data
        raise ImageError(f"damaged or truncated image: {_message(error)}") from None


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop uint8 [size, size, 3] of an RGB image, to the pixel (arXiv 2105.05233).

    Source: `center_crop_arr` in openai/guided-diffusion, image_datasets.py.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is no reason to lose sound pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no agreed range; convert to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("integer pixels outside 0..65535; convert to 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _check_aspect(width: int, height: int, size: int, max_pixels: int) -> None:
    # A strip of few pixels becomes gigabytes when its short side is scaled up to `size`.
    resized = size * size * max(width, height) // min(width, height)
    if resized > max(max_pixels, 100 * size * size):
        raise ImageError(
            f"{width}x{height} is too long a strip: {resized} pixels at short side {size}"
        )


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return re.sub(r"<([\w.]+)[^<>]* at 0x[0-9a-fA-F]+>", r"<\1>", text)


def _source_filter(data: DataSection) -> Callable[[str], bool]:
    """Whether an address of a plan belongs to the source."""
    if data.path is None or data.format == "list":
        return lambda uri: True
    remote = storage.is_s3(data.path)
    root = data.path.rstrip("/") if remote else storage.filesystem(data.path)[1].rstrip("/")
    may_be_list = data.format == "auto" and root.lower().endswith((".csv", ".parquet"))

    def inside(uri: str) -> bool:
        match = _ROW.fullmatch(uri) or _RANGE.fullmatch(uri)
        path = match[1] if match else uri
        below = path.startswith(f"{root}/") and "/../" not in path
        return below or path == root or (may_be_list and match is None)

    return inside


def _attempt(read: Callable[[str], bytes], uri: str) -> bytes | Exception:
    try:
        return read(uri)
    except Exception as error:
        return error


def _read_rows(
    uri: str, wanted: Sequence[tuple[int, int]], column: str, blobs: list[bytes | Exception]
) -> None:
    try:
        with storage.open_input(uri) as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
            _refuse_extensions(parquet.schema_arrow, [column], uri)
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
                _read_row_group(parquet, group, offsets, column, uri, blobs)
    except Exception as error:
        for _, index in wanted:
            blobs[index] = _read_error(uri, error)


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
            blobs[index] = _read_error(uri, error)
        return
    for offset, index in offsets:
        blobs[index] = _cell_bytes(values[offset].as_py(), uri)


def _cell_bytes(cell: Any, uri: str) -> bytes | Exception:
    if isinstance(cell, dict):
        # Hugging Face's Image: bytes where they are embedded, else a path beside the file.
        if cell.get("bytes") is None and cell.get("path"):
            try:
                return storage.read_bytes(_beside(str(cell["path"]), _parent(uri), uri))
            except (OSError, ValueError) as error:
                return error
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else ImageError("no image in this row (null)")


def _read_ranges(
    uri: str, wanted: Sequence[tuple[int, int, int]], blobs: list[bytes | Exception]
) -> None:
    try:
        file = storage.open_input(uri)
    except Exception as error:
        for _, _, index in wanted:
            blobs[index] = error
        return

    def read(place: tuple[int, int, int]) -> bytes | Exception:
        offset, size, _ = place
        try:
            content: bytes = file.read_at(size, offset)
        except Exception as error:
            return _read_error(uri, error)
        if len(content) < size:
            return ImageError(f"{len(content)} of {size} bytes at {offset} of {uri}")
        return content

    threads = min(THREADS, len(wanted)) if storage.is_s3(uri) else 1
    with file, ThreadPoolExecutor(threads) as pool:
        for (_, _, index), content in zip(wanted, pool.map(read, wanted), strict=True):
            blobs[index] = content


def _read_error(uri: str, error: Exception) -> Exception:
    if isinstance(error, pa.ArrowInvalid):
        return ImageError(f"{uri} is not readable Parquet: {error}")
    return storage.storage_error("read", uri, error)


def _listing(path: str) -> pa.ChunkedArray:
    """Addresses of all visible files of the source, sorted."""
    uris = (file.uri for file in storage.list_files(path))
    visible = (
        uri
        for uri in uris
        if not any(part.startswith(".") for part in _relative(uri, path).split("/"))
    )
    chunks = []
    for some in batched(visible, ROWS_AT_ONCE):
        _check_text(*some)
        chunks.append(pa.array(some, pa.large_string()))
    table = pa.table({"uri": pa.chunked_array(chunks, pa.large_string())})
    return _in_order(table, "uri")["uri"]


def _in_order(table: pa.Table, *columns: str) -> pa.Table:
    """`table` sorted by `columns`; itself where the first column ascends already, as a listing of S3 does."""
    first = table[columns[0]]
    if pc.all(pc.less(first[:-1], first[1:])).as_py() is not False:
        return table
    return table.sort_by([(column, "ascending") for column in columns])


def _relative(uri: str, path: str) -> str:
    """`uri` below `path` with forward slashes; its file name where `path` is that file."""
    root = path.rstrip("/") if uri.startswith("s3://") else storage.filesystem(path)[1].rstrip("/")
    return posixpath.basename(uri) if uri == root else uri[len(root) + 1 :]


def _parent(uri: str) -> str:
    return uri.rpartition("/")[0]


def _check_text(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SourceError(f"{text!r} is not valid Unicode. Rename the file.") from None


def _ends(uris: pa.ChunkedArray, suffixes: Sequence[str]) -> pa.ChunkedArray:
    pattern = "|".join(re.escape(suffix) for suffix in suffixes)
    return pc.match_substring_regex(uris, f"(?:{pattern})$", ignore_case=True)


def _detect(uris: pa.ChunkedArray, data: DataSection) -> str:
    """What `uris` are, by their names; a lone Parquet file without the image column is a list."""
    suffixes = {
        "folder": IMAGE_SUFFIXES,
        "parquet": (".parquet",),
        "webdataset": (".tar", *COMPRESSED_TAR),
    }
    kinds = {kind: pc.sum(_ends(uris, ends)).as_py() or 0 for kind, ends in suffixes.items()}
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
        columns = _schema(lone).names
        if data.image_column not in columns and data.uri_column in columns:
            return "list"
    return present[0] if present else "folder"


def _plan_folder(uris: pa.ChunkedArray, data: DataSection) -> pa.Table:
    images = uris.filter(_ends(uris, IMAGE_SUFFIXES))
    if not len(images):
        return RECORDS.empty_table()
    first = images[0].as_py()
    start = len(first) - len(_relative(first, str(data.path)))
    # All begin with the same folder, so keys are in the order of the addresses.
    keys = pc.utf8_slice_codeunits(images, start)
    labels = pa.nulls(len(keys), pa.int64())
    if pc.all(pc.match_substring(keys, "/")).as_py():
        classes = pc.replace_substring_regex(keys, "(?s)/.*", "")
        names = pa.array(sorted(pc.unique(classes).to_pylist()), pa.large_string())
        labels = pc.index_in(classes, value_set=names).cast(pa.int64())
    return pa.table([keys, images, labels, pa.nulls(len(keys), pa.large_string())], schema=RECORDS)


def _plan_parquet(uris: Sequence[str], data: DataSection) -> Iterator[ImageRecord]:
    for uri in uris:
        if not uri.lower().endswith(".parquet"):
            continue
        _require(data.image_column, "image_column", _schema(uri).names, uri)
        relative = _relative(uri, str(data.path))
        for row, values in enumerate(_parquet_rows(uri, _wanted(data), data)):
            where = f"{uri}, row {row}"
            key = f"{relative}#{row:08d}" if data.key_column is None else _key(values, data, where)
            yield _record(key, f"{uri}#row={row}", values, data, where)


def _plan_list(uris: Sequence[str], data: DataSection) -> Iterator[ImageRecord]:
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
        address = _resolve(str(given), _parent(uri), where)
        key = str(given) if data.key_column is None else _key(values, data, where)
        yield _record(key, address, values, data, where)


def _plan_tar(uris: Sequence[str], data: DataSection) -> Iterator[ImageRecord]:
    for uri in uris:
        if uri.lower().endswith(COMPRESSED_TAR):
            raise SourceError(
                f"{uri} is a compressed tar, from whose middle no image can be read. "
                "Unpack it to a plain .tar."
            )
    tars = [uri for uri in uris if uri.lower().endswith(".tar")]

    def plan(uri: str) -> list[ImageRecord]:
        return list(_tar_records(uri, _relative(uri, str(data.path)), data))

    with ThreadPoolExecutor(THREADS) as pool:
        for some in batched(tars, THREADS):
            for records in pool.map(plan, some):
                yield from records


def _tar_records(uri: str, relative: str, data: DataSection) -> Iterator[ImageRecord]:
    images: list[tuple[str, str]] = []
    values: dict[str, dict[str, Any]] = {}
    label, caption = data.label_column or "label", data.caption_column or "caption"
    try:
        # Read ahead: small members lie within one range, and the bodies of large ones are not fetched.
        with (
            storage.open_input(uri) as file,
            io.BufferedReader(file, TAR_READ_AHEAD) as buffered,
            tarfile.open(fileobj=buffered, mode="r:") as tar,
        ):
            for member in tar:
                folder, base = posixpath.split(member.name)
                stem, _, suffix = base.partition(".")
                suffix = "." + suffix.lower().rpartition(".")[2]
                if not member.isreg() or member.issparse() or not stem:
                    continue
                prefix = posixpath.join(folder, stem)
                if suffix in WEBDATASET_IMAGES:
                    images.append((prefix, f"{uri}#offset={member.offset_data}&size={member.size}"))
                elif suffix in (".cls", ".txt", ".json"):
                    content = tar.extractfile(member)
                    text = content.read().decode() if content else ""
                    known = values.setdefault(prefix, {})
                    if suffix == ".json":
                        given = json.loads(text)
                        if isinstance(given, dict):
                            values[prefix] = {
                                k: given[k] for k in (label, caption) if k in given
                            } | known
                    else:
                        known[label if suffix == ".cls" else caption] = text.strip()
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{uri} is not a readable WebDataset shard: {_message(error)}") from None
    for prefix, address in images:
        known = values.get(prefix, {})
        where = f"{uri}, member {prefix!r}"
        yield _record(f"{relative}/{prefix}", address, known, data, where)


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


def _refuse_extensions(schema: pa.Schema, columns: Sequence[str], uri: str) -> None:
    """Values of Ray's type for Python objects unpickle, and so run, when they are looked at."""

    def extended(kind: pa.DataType) -> bool:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        if pa.types.is_dictionary(kind):
            inner.append(kind.value_type)
        return isinstance(kind, pa.BaseExtensionType) or any(map(extended, inner))

    for column in columns:
        if column in schema.names and extended(schema.field(column).type):
            raise SourceError(
                f"{uri}: column {column!r} is of the extension type {schema.field(column).type}, which "
                "is not read from a source. Store bytes, strings and integers."
            )


def _require(column: str, field: str, names: Sequence[str], uri: str) -> None:
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SourceError(
            f"{uri} has no column {column!r} (data.{field}).{hint} It has: {', '.join(names)}."
        )


def _schema(uri: str) -> pa.Schema:
    try:
        with storage.open_input(uri) as file:
            return pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{uri} is not readable Parquet: {error}") from None


def _parquet_rows(uri: str, wanted: Sequence[str], data: DataSection) -> Iterator[dict[str, Any]]:
    schema = _schema(uri)
    columns = _check_columns(schema.names, wanted, data, uri)
    _refuse_extensions(schema, columns, uri)
    with storage.open_input(uri) as file, pq.ParquetFile(file) as parquet:
        if not columns:
            yield from ({} for _ in range(parquet.metadata.num_rows))
            return
        for batch in parquet.iter_batches(batch_size=8192, columns=columns):
            yield from batch.to_pylist()


def _csv_rows(uri: str, wanted: Sequence[str], data: DataSection) -> Iterator[dict[str, Any]]:
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
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


def _record(
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
    return _beside(given, folder, where)


def _beside(given: str, folder: str, where: str) -> str:
    """The address of the relative path `given` in `folder`, which neither it nor a link may leave."""
    path = posixpath.normpath(given)
    address = storage.join(folder, path)
    leaves = path == ".." or path.startswith(("../", "/")) or "://" in given
    if not leaves and not storage.is_s3(folder):
        root = os.path.realpath(folder).rstrip("/")
        leaves = not os.path.realpath(address).startswith(f"{root}/")
    if leaves:
        raise SourceError(
            f"{where}: {given!r} leaves {folder}. Give an absolute path in a list instead."
        )
    return address
