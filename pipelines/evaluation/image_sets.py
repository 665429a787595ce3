"""The sets of images that `fae evaluate` compares: any source, an .npz, the output of `fae sample`, saved statistics.

`open_set` lists a set and reads no pixels; `read_piece` gives the uint8 crops of one piece of its work. An .npz is ADM's:
arr_0 uint8 [n, S, S, 3], and mu, sigma (Inception's pool), mu_s, sigma_s (its spatial features); ours adds mu_backbone,
sigma_backbone and says in `fae` what made them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fae_core.errors import UserError
from fae_core.metrics.frechet import Gaussian

from ..config import Recipe
from ..config.sections import DataSection
from ..data import list_images
from ..data.reading import load_crops, read_records
from ..data.records import IMAGE_SUFFIXES, ImageRecord, SourceError
from ..sampling import FORMAT as SAMPLES_FORMAT
from ..storage import paths

STATISTICS_FORMAT = "fae-statistics-1"
ARRAYS = {
    "inception": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
    "backbone": ("mu_backbone", "sigma_backbone"),
}


class EvaluationError(UserError, ValueError):
    """A comparison that cannot be made; the message says which reference the score wants."""


@dataclass
class ImageSet:
    """One side of a comparison. `keys` are without the file's suffix, so that a PNG pairs with its JPEG."""

    uri: str
    kind: str
    """source, samples, npz or statistics."""
    identity: str
    """SHA-256 of what the listing tells: names, sizes, times or ETags; of samples, their manifest."""
    keys: list[str] = field(default_factory=list)
    records: list[ImageRecord] | None = None
    image_column: str = "image"
    first_pixel: int = 0
    """npz: the byte of the file where arr_0's values begin."""
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the networks that made the samples or the statistics, where the set tells."""

    def pieces(self, size: int) -> list[dict[str, Any]]:
        """The work of this set in order, `size` images each: what `read_piece` takes, JSON-safe."""
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


def open_set(role: str, recipe: Recipe) -> ImageSet:
    """The set that `evaluate.ROLE` (images or reference) names, its first `evaluate.limit` images.

    Raises EvaluationError and StorageError.
    """
    uri, limit = str(getattr(recipe.evaluate, role)), recipe.evaluate.limit
    if uri.lower().endswith(".npz"):
        return _open_npz(uri, recipe.image_size, limit)
    manifest = _samples_manifest(uri)
    if manifest is not None:
        data = DataSection(
            path=paths.join(uri, "shards"),
            format="parquet",
            key_column="index",
            max_pixels=recipe.data.max_pixels,
            limit=limit,
        )
    else:
        data = recipe.data.model_copy(update={"path": uri, "format": "auto", "limit": limit})
    try:
        records = list_images(data)
    except SourceError as error:
        # It speaks of data.path, which is not what was given here.
        text = str(error).replace("data.path", f"evaluate.{role}")
        raise EvaluationError(text.replace("Set data.format.", "Give a folder of one.")) from None
    keys = [_without_suffix(record.key) for record in records]
    files = {record.uri.partition("#")[0] for record in records}
    found = ImageSet(uri, "source", _listing_sha256(uri, files), keys, records, data.image_column)
    if manifest is not None:
        found.kind, found.identity = "samples", _sha256(manifest)
        found.made_with = {
            name: str(manifest[name]) for name in ("generator", "autoencoder") if name in manifest
        }
        _check_sample_size(uri, records[0], recipe)
    return found


def read_piece(
    piece: Mapping[str, Any], recipe: Recipe
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Crops uint8 [n, S, S, 3] of one piece, their positions in it, and the errors of the others."""
    if "npz" in piece:
        side, count = recipe.image_size, piece["stop"] - piece["start"]
        pixels = side * side * 3
        with paths.open_input(piece["npz"]) as file:
            file.seek(piece["at"] + piece["start"] * pixels)
            content = file.read(count * pixels)
        if len(content) != count * pixels:
            raise EvaluationError(f"{piece['npz']} ends early: arr_0 is not whole.")
        images = np.frombuffer(content, np.uint8).reshape(count, side, side, 3)
        return images, list(range(count)), []
    records = [ImageRecord(key, uri) for key, uri in piece["records"]]
    data = _data_of(piece["source"], piece["column"], recipe)
    return load_crops(records, recipe.image_size, data)


def write_statistics(
    uri: str, statistics: Mapping[str, Gaussian], made_with: Mapping[str, str], about: Any
) -> None:
    """Save mean and covariance by feature as an .npz that `open_set` reads, and ADM's evaluator too where arr_0 is not asked."""
    arrays: dict[str, Any] = {}
    for name, gaussian in statistics.items():
        mean, covariance = ARRAYS[name]
        arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    counts = {name: gaussian.count for name, gaussian in statistics.items()}
    text = {
        "format": STATISTICS_FORMAT,
        "counts": counts,
        "made_with": dict(made_with),
        "about": about,
    }
    buffer = io.BytesIO()
    np.savez(buffer, fae=np.array(json.dumps(text)), **arrays)
    paths.write_bytes(uri, buffer.getvalue())


def read_statistics(uri: str) -> tuple[dict[str, Gaussian], dict[str, str], Any]:
    """What `write_statistics` or ADM saved: Gaussians by feature, the networks' fingerprints, and `about`."""
    with _opened_npz(uri) as archive:
        text: dict[str, Any] = {}
        if "fae" in archive.files:
            text = json.loads(str(archive["fae"]))
        found = {
            name: _gaussian(uri, name, archive, text.get("counts", {}).get(name))
            for name, (mean, covariance) in ARRAYS.items()
            if mean in archive.files and covariance in archive.files
        }
    return found, text.get("made_with", {}), text.get("about")


def _gaussian(uri: str, name: str, archive: Any, count: int | None) -> Gaussian:
    mean, covariance = (np.asarray(archive[part], dtype=np.float64) for part in ARRAYS[name])
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(
            f"{uri}: {ARRAYS[name]} are {mean.shape} and {covariance.shape}, not [D] and [D, D]."
        )
    return Gaussian(mean, covariance, count)


def _open_npz(uri: str, image_size: int, limit: int | None) -> ImageSet:
    identity = _listing_sha256(uri, None)
    statistics, made_with, _ = read_statistics(uri)
    with _opened_npz(uri) as archive:
        has_images = "arr_0" in archive.files
        names = archive.files
    if not has_images and not statistics:
        raise EvaluationError(
            f"{uri} holds {', '.join(names) or 'nothing'}: neither images (arr_0) nor statistics (mu and sigma)."
        )
    if not has_images:
        return ImageSet(uri, "statistics", identity, statistics=statistics, made_with=made_with)
    first_pixel, count = _locate_images(uri, image_size)
    keys = [f"{index:08d}" for index in range(min(count, limit or count))]
    return ImageSet(
        uri,
        "npz",
        identity,
        keys,
        first_pixel=first_pixel,
        statistics=statistics,
        made_with=made_with,
    )


def _locate_images(uri: str, image_size: int) -> tuple[int, int]:
    """Where arr_0's values begin in the file, and how many images they are."""
    with paths.open_input(uri) as file, zipfile.ZipFile(file) as archive:
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise EvaluationError(
                f"{uri} is compressed, so no image in its middle can be read. Write it with numpy.savez."
            )
        with archive.open(info) as member:
            if np.lib.format.read_magic(member) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
            header = member.tell()
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise EvaluationError(f"{uri}: arr_0 is {dtype} {shape}, not uint8 [n, S, S, 3].")
        if shape[1:3] != (image_size, image_size):
            raise EvaluationError(
                f"{uri} holds images of {shape[1]}x{shape[2]}, the recipe's image_size is {image_size}. "
                "Scores of different sizes do not compare: set image_size, or take a reference of this size."
            )
        # The local header's own lengths: they may differ from the directory's.
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name_length + extra_length + header, shape[0]


@contextlib.contextmanager
def _opened_npz(uri: str) -> Iterator[Any]:
    with paths.open_input(uri) as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of them")
            yield archive
        except UserError:
            raise
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"{uri} is not a sound .npz file: {str(error)[:100]}.") from None


def _samples_manifest(uri: str) -> dict[str, Any] | None:
    manifest_uri = paths.join(uri, "manifest.json")
    if paths.exists(manifest_uri):
        manifest = json.loads(paths.read_bytes(manifest_uri))
        return manifest if manifest.get("format") == SAMPLES_FORMAT else None
    if paths.exists(paths.join(uri, "plan.json")):
        raise EvaluationError(f"{uri}: samples that are not finished. Run `fae sample` again.")
    return None


def _data_of(uri: str, image_column: str, recipe: Recipe) -> DataSection:
    """How records of the set at `uri` are read: from there alone, not from the recipe's own data."""
    changes = {"path": uri, "format": "auto", "image_column": image_column}
    return recipe.data.model_copy(update=changes)


def _check_sample_size(uri: str, record: ImageRecord, recipe: Recipe) -> None:
    (blob,) = read_records([record], _data_of(uri, "image", recipe))
    if isinstance(blob, Exception):
        raise blob
    with Image.open(io.BytesIO(blob)) as image:
        if image.size != (recipe.image_size, recipe.image_size):
            raise EvaluationError(
                f"{uri} holds samples of {image.width}x{image.height}, the recipe's image_size is "
                f"{recipe.image_size}: set image_size={image.width}."
            )


def _listing_sha256(uri: str, wanted: set[str] | None) -> str:
    """SHA-256 of name, size and ETag or time of the files under `uri`; of those in `wanted` alone, where it is given."""
    files = sorted(paths.list_files(uri), key=lambda file: file.uri)
    return _sha256(
        [
            [posixpath.basename(f.uri), f.size, f.etag or os.stat(f.uri).st_mtime_ns]
            for f in files
            if wanted is None or f.uri in wanted
        ]
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_suffix(key: str) -> str:
    stem, suffix = posixpath.splitext(key)
    return stem if suffix.lower() in IMAGE_SUFFIXES else key
