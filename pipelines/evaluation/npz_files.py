"""The .npz files of evaluation: a set of images, statistics of features, or both.

The arrays are those of ADM's evaluator (github.com/openai/guided-diffusion, evaluations/): arr_0
uint8 [n, S, S, 3]; mu and sigma of Inception's pool; mu_s and sigma_s of its spatial features. Ours
add mu_backbone and sigma_backbone, and a JSON text `fae` that says what made them. Imports no
torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fae_core.errors import UserError
from fae_core.metrics.frechet import Gaussian

from ..storage import paths
from .errors import EvaluationError

STATISTICS_FORMAT = "fae-statistics-1"
ARRAYS = {
    "inception": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
    "backbone": ("mu_backbone", "sigma_backbone"),
}
"""Names of the arrays of mean and covariance, by feature."""


def write_statistics(
    uri: str, statistics: Mapping[str, Gaussian], made_with: Mapping[str, str], about: Any
) -> None:
    """Save mean and covariance by feature; `about` is any JSON value.

    `open_set` reads the file, and so does ADM's evaluator where it does not need arr_0.
    """
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
    """What `write_statistics` or ADM saved: Gaussians by feature, `made_with` and `about`.

    ADM's files name no networks, so `made_with` is empty and `about` None. Raises EvaluationError.
    """
    with _opened(uri) as archive:
        text: dict[str, Any] = {}
        if "fae" in archive.files:
            text = json.loads(str(archive["fae"]))
        found = {
            name: _gaussian(uri, name, archive, text.get("counts", {}).get(name))
            for name, (mean, covariance) in ARRAYS.items()
            if mean in archive.files and covariance in archive.files
        }
    return found, text.get("made_with", {}), text.get("about")


def array_names(uri: str) -> list[str]:
    """Names of the arrays in the file. Raises EvaluationError where it is not a sound .npz."""
    with _opened(uri) as archive:
        return list(archive.files)


def locate_images(uri: str, image_size: int) -> tuple[int, int]:
    """The byte of the file at which arr_0's values begin, and the number of images.

    Raises EvaluationError where arr_0 is compressed or not uint8 [n, image_size, image_size, 3].
    """
    with paths.open_input(uri) as file, zipfile.ZipFile(file) as archive:
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise EvaluationError(
                f"{uri} is compressed, so single images cannot be read from it. "
                "Write it with numpy.savez."
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
                f"{uri} holds images of {shape[1]}x{shape[2]}, the recipe's image_size is "
                f"{image_size}. Scores of different sizes cannot be compared: set image_size, or "
                "use a reference of this size."
            )
        # The lengths in the local header may differ from those in the central directory.
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name_length + extra_length + header, shape[0]


def read_images(uri: str, first_pixel: int, start: int, stop: int, image_size: int) -> np.ndarray:
    """Images `start` to `stop` of arr_0, uint8 [n, image_size, image_size, 3].

    `first_pixel` is what `locate_images` found. Raises EvaluationError where the file is too short.
    """
    count, pixels = stop - start, image_size * image_size * 3
    with paths.open_input(uri) as file:
        file.seek(first_pixel + start * pixels)
        content = file.read(count * pixels)
    if len(content) != count * pixels:
        raise EvaluationError(f"{uri} ends early: arr_0 is not complete.")
    return np.frombuffer(content, np.uint8).reshape(count, image_size, image_size, 3)


def _gaussian(uri: str, name: str, archive: Any, count: int | None) -> Gaussian:
    mean, covariance = (np.asarray(archive[part], dtype=np.float64) for part in ARRAYS[name])
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(
            f"{uri}: {ARRAYS[name]} are {mean.shape} and {covariance.shape}, not [D] and [D, D]."
        )
    return Gaussian(mean, covariance, count)


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Any]:
    with paths.open_input(uri) as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of arrays")
            yield archive
        except UserError:
            raise
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"{uri} is not a sound .npz file: {str(error)[:100]}.") from None
