"""The sets of images that `fae evaluate` compares.

A set is any source of images, an .npz file (`npz_files.py`), the output of `fae sample`, or
statistics that an evaluation saved. `open_set` lists a set and decodes no image; `read_piece` reads
the crops of one piece of its work. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from fae_core.metrics.frechet import Gaussian

from ..config.sections import DataSection
from ..data import list_images
from ..data.crops import ImageError
from ..data.reading import load_crops, read_records
from ..data.records import IMAGE_SUFFIXES, ImageRecord, SourceError
from ..sampling import FORMAT as SAMPLES_FORMAT
from ..storage import paths
from .errors import EvaluationError
from .npz_files import array_names, locate_images, read_images, read_statistics


@dataclass
class ImageSet:
    """One side of a comparison."""

    uri: str
    kind: Literal["source", "samples", "npz", "statistics"]
    identity: str
    """SHA-256 of the listing: names, sizes, times or ETags; of samples, of their manifest."""
    keys: list[str] = field(default_factory=list)
    """Keys without the file's suffix, so that a PNG pairs with its JPEG."""
    records: list[ImageRecord] | None = None
    """Images in the order of `keys`; None for an .npz file."""
    image_column: str = "image"
    first_pixel: int = 0
    """npz: the byte of the file at which arr_0's values begin."""
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    """Statistics by feature, from the set's file or from an extraction."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the networks that made the samples or the statistics, where known."""

    def pieces(self, size: int) -> list[dict[str, Any]]:
        """The set in pieces of `size` images, in order; each is JSON and goes to `read_piece`."""
        starts = range(0, len(self.keys), size)
        if self.records is None:
            return [
                {
                    "npz": self.uri,
                    "at": self.first_pixel,
                    "start": start,
                    "stop": min(start + size, len(self.keys)),
                }
                for start in starts
            ]
        parts = [self.records[start : start + size] for start in starts]
        return [
            {
                "records": [[r.key, r.uri] for r in part],
                "source": self.uri,
                "column": self.image_column,
            }
            for part in parts
        ]


def open_set(
    role: str, uri: str, limit: int | None, image_size: int, data: DataSection
) -> ImageSet:
    """List the set at `uri`; with `limit`, only its first images in key order.

    `role` is images or reference, the key of the evaluate section that names `uri`. `data` says how
    a source is read; its own path, format and limit are not used. Raises EvaluationError and
    StorageError.
    """
    if uri.lower().endswith(".npz"):
        return _open_npz(uri, image_size, limit)
    manifest = _samples_manifest(uri)
    if manifest is not None:
        listed = DataSection(
            path=paths.join(uri, "shards"),
            format="parquet",
            key_column="index",
            max_pixels=data.max_pixels,
            limit=limit,
        )
    else:
        listed = data.model_copy(update={"path": uri, "format": "auto", "limit": limit})
    try:
        records = list_images(listed)
    except SourceError as error:
        # The message names data.path, but this address is the value of evaluate.ROLE.
        text = str(error).replace("data.path", f"evaluate.{role}")
        raise EvaluationError(text.replace("Set data.format.", "Give a folder of one.")) from None
    keys = [_without_suffix(record.key) for record in records]
    files = {record.uri.partition("#")[0] for record in records}
    found = ImageSet(uri, "source", _listing_sha256(uri, files), keys, records, listed.image_column)
    if manifest is not None:
        found.kind, found.identity = "samples", _sha256(manifest)
        found.made_with = {
            name: str(manifest[name]) for name in ("generator", "autoencoder") if name in manifest
        }
        _check_sample_size(uri, records[0], image_size, data)
    return found


def read_piece(
    piece: Mapping[str, Any], image_size: int, data: DataSection
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Crops uint8 [n, S, S, 3] of one piece, their positions in it, and the others' errors."""
    if "npz" in piece:
        start, stop = piece["start"], piece["stop"]
        images = read_images(piece["npz"], piece["at"], start, stop, image_size)
        return images, list(range(len(images))), []
    records = [ImageRecord(key, uri) for key, uri in piece["records"]]
    return load_crops(records, image_size, _data_at(piece["source"], piece["column"], data))


def _open_npz(uri: str, image_size: int, limit: int | None) -> ImageSet:
    identity = _listing_sha256(uri, None)
    statistics, made_with, _ = read_statistics(uri)
    names = array_names(uri)
    if "arr_0" in names:
        first_pixel, count = locate_images(uri, image_size)
        if not count:
            raise EvaluationError(f"{uri} holds no images: arr_0 is empty.")
        return ImageSet(
            uri,
            "npz",
            identity,
            keys=[f"{index:08d}" for index in range(min(count, limit or count))],
            first_pixel=first_pixel,
            statistics=statistics,
            made_with=made_with,
        )
    if not statistics:
        raise EvaluationError(
            f"{uri} holds {', '.join(names) or 'nothing'}: neither images (arr_0) nor statistics "
            "(mu and sigma)."
        )
    return ImageSet(uri, "statistics", identity, statistics=statistics, made_with=made_with)


def _samples_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest of a sample store, None where `uri` holds something else."""
    manifest_uri = paths.join(uri, "manifest.json")
    if paths.exists(manifest_uri):
        manifest = json.loads(paths.read_bytes(manifest_uri))
        return manifest if manifest.get("format") == SAMPLES_FORMAT else None
    if paths.exists(paths.join(uri, "plan.json")):
        raise EvaluationError(f"{uri}: these samples are not finished. Run `fae sample` again.")
    return None


def _data_at(uri: str, image_column: str, data: DataSection) -> DataSection:
    """How records of the set at `uri` are read: from there, not from the recipe's own data."""
    return data.model_copy(update={"path": uri, "format": "auto", "image_column": image_column})


def _check_sample_size(uri: str, record: ImageRecord, image_size: int, data: DataSection) -> None:
    (blob,) = read_records([record], _data_at(uri, "image", data))
    try:
        if isinstance(blob, Exception):
            raise blob
        opened = Image.open(io.BytesIO(blob))
    except (ImageError, OSError) as error:
        raise EvaluationError(f"{uri}: the sample {record.key} cannot be read: {error}") from None
    with opened as image:
        if image.size != (image_size, image_size):
            raise EvaluationError(
                f"{uri} holds samples of {image.width}x{image.height}, the recipe's image_size is "
                f"{image_size}: set image_size={image.width}."
            )


def _listing_sha256(uri: str, wanted: set[str] | None) -> str:
    """SHA-256 of name, size and ETag or time of the files under `uri`, or of those in `wanted`."""
    files = sorted(paths.list_files(uri), key=lambda file: file.uri)
    return _sha256(
        [
            [
                posixpath.basename(f.uri),
                f.size,
                f.etag or os.stat(paths.filesystem(f.uri)[1]).st_mtime_ns,
            ]
            for f in files
            if wanted is None or f.uri in wanted
        ]
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_suffix(key: str) -> str:
    stem, suffix = posixpath.splitext(key)
    return stem if suffix.lower() in IMAGE_SUFFIXES else key
