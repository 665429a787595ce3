"""Image sources to planned records to uint8 crops: folders, Parquet, WebDataset shards, lists.

`list_images` plans (no pixels are read), `read_records` fetches encoded bytes, `decode_image` makes
ADM's centre crop from them. Plain functions without Ray, local or on S3; `precompute.py` and
`train_autoencoder.py` run them in Ray Data.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from fae_core.errors import UserError
from pipelines import storage
from pipelines.config import DataSection
from pipelines.storage import FileInfo

# decode_image holds the recipe's limit; Pillow's own fixed one would refuse before it.
Image.MAX_IMAGE_PIXELS = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WEBDATASET_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
S3_THREADS = 16

_ROW = re.compile(r"(.+)#row=(\d+)")
_RANGE = re.compile(r"(.+)#offset=(\d+)&size=(\d+)")


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


def list_images(data: DataSection) -> list[ImageRecord]:
    """The images of `data.path` in key order, the first `data.limit` of them; no pixels are read.

    Raises SourceError for a missing path, an empty source, an unknown column, a repeated key.
    """
    if not data.path:
        raise SourceError("data.path is not set. Give a folder, a file or an s3:// prefix.")
    files = sorted(_visible_files(data.path), key=lambda file: file.uri)
    if not files and not storage.exists(data.path):
        raise SourceError(f"data.path={data.path!r} does not exist.")
    source_format = _detect(files, data) if data.format == "auto" else data.format
    plan = {
        "folder": _plan_folder,
        "parquet": _plan_parquet,
        "webdataset": _plan_tar,
        "list": _plan_list,
    }[source_format]
    records = sorted(plan(files, data), key=lambda record: (record.key, record.uri))
    if not records:
        raise SourceError(
            f"data.path={data.path!r} holds no images (0 of {len(files)} files; read as "
            f"{source_format}). Hidden files and links that leave the source are not read."
        )
    for first, second in itertools.pairwise(records):
        if first.key == second.key:
            raise SourceError(
                f"The key {first.key!r} occurs twice: {first.uri} and {second.uri}. Keys name "
                "images in the store; remove one, or choose another data.key_column."
            )
    for record in records:
        _check_text(record.key, record.uri, record.caption or "")
    return records[: data.limit]


def read_records(records: Sequence[ImageRecord], data: DataSection) -> list[bytes | Exception]:
    """The encoded bytes of each record, or the exception of one that cannot be read.

    Rows of one Parquet file are read together, one row group at a time and only the image column;
    ranges of one tar file share one open file; objects on S3 are fetched by 16 threads.
    """
    blobs: list[bytes | Exception] = [ImageError("not read")] * len(records)
    rows: dict[str, list[tuple[int, int]]] = {}
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    remote: list[int] = []
    for index, record in enumerate(records):
        if match := _ROW.fullmatch(record.uri):
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
        with ThreadPoolExecutor(min(S3_THREADS, len(remote))) as pool:
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
                return storage.read_bytes(_resolve(cell["path"], _parent(uri), uri))
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
    with file:
        for offset, size, index in wanted:
            try:
                file.seek(offset)
                content = file.read(size)
            except Exception as error:
                blobs[index] = _read_error(uri, error)
                continue
            if len(content) == size:
                blobs[index] = content
            else:
                blobs[index] = ImageError(f"{len(content)} of {size} bytes at {offset} of {uri}")


def _read_error(uri: str, error: Exception) -> Exception:
    if isinstance(error, pa.ArrowInvalid):
        return ImageError(f"{uri} is not readable Parquet: {error}")
    return storage.storage_error("read", uri, error)


def _visible_files(path: str) -> Iterator[FileInfo]:
    for file in storage.list_files(path):
        if not any(part.startswith(".") for part in _relative(file.uri, path).split("/")):
            yield file


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


def _detect(files: Sequence[FileInfo], data: DataSection) -> str:
    """What `files` are, by their names; a lone Parquet file without the image column is a list."""
    names = [file.uri.lower() for file in files]
    kinds = {
        "folder": sum(name.endswith(IMAGE_SUFFIXES) for name in names),
        "parquet": sum(name.endswith(".parquet") for name in names),
        "webdataset": sum(name.endswith((".tar", *COMPRESSED_TAR)) for name in names),
    }
    present = [kind for kind, count in kinds.items() if count]
    if len(present) > 1:
        counts = ", ".join(f"{kinds[kind]} for {kind}" for kind in present)
        raise SourceError(
            f"data.path={data.path!r} holds several kinds ({counts}). Set data.format."
        )
    if len(names) == 1 and names[0].endswith(".csv"):
        return "list"
    if present == ["parquet"] and len(names) == 1:
        columns = _schema(files[0].uri).names
        if data.image_column not in columns and data.uri_column in columns:
            return "list"
    return present[0] if present else "folder"


def _plan_folder(files: Sequence[FileInfo], data: DataSection) -> Iterator[ImageRecord]:
    path = str(data.path)
    images = {
        _relative(file.uri, path): file.uri
        for file in files
        if file.uri.lower().endswith(IMAGE_SUFFIXES)
    }
    classes = sorted({key.split("/")[0] for key in images if "/" in key})
    labels = {name: index for index, name in enumerate(classes)}
    in_classes = all("/" in key for key in images)
    for key, uri in images.items():
        yield ImageRecord(key, uri, labels[key.split("/")[0]] if in_classes else None)


def _plan_parquet(files: Sequence[FileInfo], data: DataSection) -> Iterator[ImageRecord]:
    for file in files:
        if not file.uri.lower().endswith(".parquet"):
            continue
        _require(data.image_column, "image_column", _schema(file.uri).names, file.uri)
        relative = _relative(file.uri, str(data.path))
        for row, values in enumerate(_parquet_rows(file.uri, _wanted(data), data)):
            where = f"{file.uri}, row {row}"
            key = f"{relative}#{row:08d}" if data.key_column is None else _key(values, data, where)
            yield _record(key, f"{file.uri}#row={row}", values, data, where)


def _plan_list(files: Sequence[FileInfo], data: DataSection) -> Iterator[ImageRecord]:
    if len(files) != 1 or not files[0].uri.lower().endswith((".csv", ".parquet")):
        raise SourceError(
            f"data.path={data.path!r}: a list is one .csv or .parquet file, not {len(files)} files."
        )
    uri = files[0].uri
    read = _csv_rows if uri.lower().endswith(".csv") else _parquet_rows
    for row, values in enumerate(read(uri, [data.uri_column, *_wanted(data)], data)):
        where = f"{uri}, row {row}"
        given = values.get(data.uri_column)
        if not given:
            raise SourceError(f"{where}: no value in column {data.uri_column!r}.")
        address = _resolve(str(given), _parent(uri), where)
        key = str(given) if data.key_column is None else _key(values, data, where)
        yield _record(key, address, values, data, where)


def _plan_tar(files: Sequence[FileInfo], data: DataSection) -> Iterator[ImageRecord]:
    for file in files:
        name = file.uri.lower()
        if name.endswith(COMPRESSED_TAR):
            raise SourceError(
                f"{file.uri} is a compressed tar, from whose middle no image can be read. "
                "Unpack it to a plain .tar."
            )
        if name.endswith(".tar"):
            yield from _tar_records(file.uri, _relative(file.uri, str(data.path)), data)


def _tar_records(uri: str, relative: str, data: DataSection) -> Iterator[ImageRecord]:
    images: list[tuple[str, str]] = []
    values: dict[str, dict[str, Any]] = {}
    label, caption = data.label_column or "label", data.caption_column or "caption"
    remote = uri.startswith("s3://")
    try:
        # On S3 one streamed GET beats a ranged GET for every 512-byte header.
        with (
            storage.open_input(uri) as file,
            tarfile.open(fileobj=file, mode="r|" if remote else "r:", bufsize=2**22) as tar,
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
    columns = _check_columns(_schema(uri).names, wanted, data, uri)
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
    path = posixpath.normpath(given)
    if path == ".." or path.startswith("../"):
        raise SourceError(f"{where}: {given!r} leaves {folder}. Give an absolute path instead.")
    return storage.join(folder, path)
