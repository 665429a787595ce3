"""Encoded images to uint8 crops: ADM's centre crop, exact or with torch's faster filter.

Plain functions without Ray; reading.py fetches the encoded bytes. Tasks of Ray Data run both.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..config.sections import DataSection
from .records import ImageRecord

if TYPE_CHECKING:
    from PIL import ImageCms

CROPS = {"exact": "adm-center-crop-1", "fast": "adm-center-crop-1-fast-1"}
COLORS = {"ignore": "", "srgb": ", srgb-1"}
FORMATS = (*("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI"),)


class ImageError(ValueError):
    """One image that cannot be read or decoded; the message is the same on every machine."""


def crop_version(data: DataSection) -> str:
    """What a fingerprint says of how an image becomes a crop."""
    return CROPS[data.decoder] + COLORS[data.color_profile]


def decode_records(
    records: Sequence[ImageRecord],
    blobs: Sequence[bytes | Exception],
    size: int,
    data: DataSection,
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Crops uint8 [n, size, size, 3], their places in `records`, and the others' errors.

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
            crops.append(
                decode_image(blob, size, data.max_pixels, data.decoder, data.color_profile)
            )
            kept.append(index)
        except ImageError as error:
            errors.append({"key": record.key, "stage": "decode", "message": _message(error)})
    images = np.stack(crops) if crops else np.empty((0, size, size, 3), np.uint8)
    return images, kept, errors


def decode_image(
    data: bytes,
    size: int,
    max_pixels: int,
    decoder: str = "exact",
    color_profile: str = "ignore",
) -> np.ndarray:
    """ADM's centre crop uint8 [size, size, 3] of one encoded image. Raises ImageError.

    The declared size is held against `max_pixels` before a pixel is decoded. EXIF rotation is
    applied, an animation gives its first frame, transparency lies on white, 16-bit grey is
    scaled (v/257); of 16-bit colour Pillow itself keeps the high byte. `decoder` and
    `color_profile` are the recipe's keys `data.decoder` and `data.color_profile`.
    """
    if not data:
        raise ImageError("empty file")
    # Here and not on import: who imports `center_crop` alone keeps Pillow's own limit.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{width}x{height} = {width * height} pixels, over data.max_pixels={max_pixels}"
                )
            image.load()
            return center_crop(image, size, max_pixels, decoder, color_profile)
    except ImageError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ImageError(f"not an image ({kinds}): it begins with {data[:12]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged data
        raise ImageError(f"damaged or truncated image: {_message(error)}") from None


def center_crop(
    image: Image.Image,
    size: int,
    max_pixels: int,
    decoder: str = "exact",
    color_profile: str = "ignore",
) -> np.ndarray:
    """ADM's centre crop uint8 [size, size, 3] of an image of any mode, as `decode_image` makes it.

    Raises ImageError for float pixels, for integers outside 0..65535, and for a strip that would
    have more than `max_pixels` pixels once its short side is `size`.
    """
    profile = image.info.get("icc_profile") if color_profile == "srgb" else None
    rgb = _to_rgb(_upright(image), profile)
    _check_aspect(*rgb.size, size, max_pixels)
    return adm_center_crop(rgb, size) if decoder == "exact" else fast_center_crop(rgb, size)


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop uint8 [size, size, 3] of an RGB image, to the pixel (arXiv 2105.05233).

    Source: `center_crop_arr` in openai/guided-diffusion, image_datasets.py.
    """
    image, resized = _halved(image, size)
    return _center(np.asarray(image.resize(resized, Image.Resampling.BICUBIC)), size)


def fast_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop uint8 [size, size, 3] of an RGB image with torch's bicubic filter.

    Both filter uint8 in integers and antialias, torch with weights of 16 bits and wide
    instructions, Pillow with weights of 22 bits. On photographs the results differ by at most 2 of
    255 levels, on average by 0.003 (docs/benchmarks.md).
    """
    import torch  # here: planning, which imports this module too, needs no torch

    image, (width, height) = _halved(image, size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        pixels, size=(height, width), mode="bicubic", antialias=True
    )
    return _center(resized[0].permute(1, 2, 0).numpy(), size)


def _halved(image: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The image halved while its short side is at least 2 * size, and its (width, height)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


def _center(pixels: np.ndarray, size: int) -> np.ndarray:
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is no reason to lose sound pixels
        return image


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB on white; with an ICC `profile`, its colors in sRGB."""
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no agreed range; convert to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("integer pixels outside 0..65535; convert to 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        layer = image.convert("RGBA")
        is_grey = image.mode in ("L", "LA")
        colors = _in_srgb(layer.getchannel("R") if is_grey else layer.convert("RGB"), profile)
        colors.putalpha(layer.getchannel("A"))
        canvas.alpha_composite(colors)
        return canvas.convert("RGB")
    return _in_srgb(image, profile)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB of an image without transparency; plain conversion where no profile applies."""
    if profile and image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _srgb_transform(profile, image.mode) if profile else None
    return transform.apply(image) if transform else image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """littleCMS's transform from `profile` to sRGB in the perceptual intent.

    None for a damaged profile and for one of another color space than `mode`, which browsers
    ignore too, and for sRGB's own, which most files have: one that leaves 32x32x32 colors as they
    are.
    """
    from PIL import ImageCms  # littleCMS is loaded only where it is asked for

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode != "RGB":
        return transform
    levels = np.linspace(0, 255, 32).astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(32, -1, 3)
    changes = np.asarray(transform.apply(Image.fromarray(colors))) != colors
    return transform if changes.any() else None


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
