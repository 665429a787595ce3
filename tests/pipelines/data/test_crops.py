"""Encoded images become the right crops, in the right colors, or errors that say why.

The crop equals one written here from ADM's definition.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fae.pipelines.data.crops import (
    ImageError,
    adm_center_crop,
    decode_image,
    fast_center_crop,
)
from tests.pictures import encode, noise

SIZE = 32
LIMIT = 1_000_000


# The crop


@pytest.mark.parametrize(
    "shape", [(32, 32), (33, 97), (500, 375), (64, 63), (127, 128), (1, 1), (5, 40), (1000, 260)]
)
def test_the_crop_is_adms_to_the_pixel(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    expected = image
    while True:  # halve by box filter for as long as the short side is at least twice the target
        width, height = expected.size
        if width < 2 * SIZE or height < 2 * SIZE:
            break
        expected = expected.resize((width // 2, height // 2), resample=Image.BOX)
    factor = SIZE / min(width, height)
    expected = expected.resize((round(width * factor), round(height * factor)), Image.BICUBIC)
    x, y = (expected.width - SIZE) // 2, (expected.height - SIZE) // 2
    crop = adm_center_crop(image, SIZE)
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, np.array(expected.crop((x, y, x + SIZE, y + SIZE))))


@pytest.mark.parametrize("size", [256, 128, 48])
def test_the_fast_crop_is_within_its_stated_error_on_photographs(
    photographs: Path, size: int
) -> None:
    errors = []
    for path in sorted(photographs.iterdir())[::6]:
        image = Image.open(path).convert("RGB")
        fast, exact = fast_center_crop(image, size), adm_center_crop(image, size)
        assert fast.shape == exact.shape and fast.dtype == np.uint8
        errors.append(np.abs(fast.astype(int) - exact))
    assert max(error.max() for error in errors) <= 2
    assert np.mean([error.mean() for error in errors]) < 0.01


def test_the_fast_crop_of_a_crop_is_itself() -> None:
    pixels = noise(SIZE, SIZE)
    np.testing.assert_array_equal(fast_center_crop(Image.fromarray(pixels), SIZE), pixels)


# Pixels: of either decoder, which differ by their filter alone


@pytest.fixture(params=["exact", "fast"])
def decode(request: pytest.FixtureRequest) -> Callable[[bytes], np.ndarray]:
    return lambda data: decode_image(data, SIZE, LIMIT, request.param)


def test_grey_becomes_three_equal_channels(decode: Callable[[bytes], np.ndarray]) -> None:
    pixels = noise(SIZE, SIZE, 1)
    np.testing.assert_array_equal(decode(encode(pixels)), np.stack([pixels] * 3, -1))


def test_sixteen_bit_grey_is_scaled_not_clipped(decode: Callable[[bytes], np.ndarray]) -> None:
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    crop = decode(encode(values))
    np.testing.assert_array_equal(crop[..., 1], np.round(values / 257).astype(np.uint8))


def test_cmyk_becomes_rgb(decode: Callable[[bytes], np.ndarray]) -> None:
    image = Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))
    crop = decode(encode(image, "JPEG", quality=95))
    np.testing.assert_allclose(crop[4, 4].astype(int), (255, 0, 0), atol=3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str, decode: Callable[[bytes], np.ndarray]) -> None:
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    options = {}
    if mode == "P":
        image = Image.new("P", (SIZE, SIZE), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        options["transparency"] = 0
    else:
        image = image.convert(mode)
    crop = decode(encode(image, **options))
    assert (crop == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(
    kind: str, decode: Callable[[bytes], np.ndarray]
) -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert tuple(decode(data)[3, 3]) == (255, 0, 0)


def test_exif_rotation_is_applied(decode: Callable[[bytes], np.ndarray]) -> None:
    pixels = noise(SIZE, SIZE)
    exif = Image.Exif()
    exif[0x0112] = 6
    crop = decode(encode(pixels, exif=exif))
    np.testing.assert_array_equal(crop, np.rot90(pixels, -1))


def test_a_phone_picture_of_several_frames_gives_its_first(
    decode: Callable[[bytes], np.ndarray],
) -> None:
    first, second = (Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue"))
    crop = decode(encode(first, "MPO", save_all=True, append_images=[second]))
    np.testing.assert_allclose(crop[3, 3].astype(int), (255, 0, 0), atol=3)


def test_one_pixel_fills_the_crop(decode: Callable[[bytes], np.ndarray]) -> None:
    crop = decode(encode(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert (crop == (1, 2, 3)).all()


def bomb() -> bytes:
    return encode(Image.new("1", (20000, 20000)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "empty file"),
        (lambda: b"hello, I am text\n", "not an image"),
        (lambda: encode(noise(90, 90), "JPEG")[:-900], "truncated"),
        (lambda: encode(noise(90, 90), "PNG")[:-900], "truncated"),
        (lambda: encode(noise(90, 90), "JPEG")[:12], "not an image|truncated"),
        (bomb, "20000x20000 = 400000000 pixels"),
        (lambda: encode(noise(1, 9000)), "1x9000 is too long a strip"),
        (lambda: encode(Image.new("F", (9, 9)), "TIFF"), "32-bit float"),
    ],
)
def test_what_cannot_be_decoded_says_why(
    make: Callable[[], bytes], message: str, decode: Callable[[bytes], np.ndarray]
) -> None:
    with pytest.raises(ImageError, match=message) as raised:
        decode(make())
    assert " at 0x" not in str(raised.value)


# Colors: an ICC profile, where the recipe asks for sRGB


def s15fixed16(values: Sequence[float]) -> bytes:
    return struct.pack(">3i", *(round(65536 * value) for value in values))


SRGB_COLUMNS = (
    (0.43607, 0.22249, 0.01392),
    (0.38515, 0.71687, 0.09708),
    (0.14307, 0.06061, 0.7141),
)
"""XYZ of the primaries of sRGB under D50, as its own profile states them."""
P3_COLUMNS = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
"""XYZ of the primaries of Display P3 under D50, as Apple's profile states them."""


def matrix_profile(columns: Sequence[Sequence[float]]) -> bytes:
    """Pillow's sRGB profile with the XYZ of other primaries; its tone curve stays."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            profile[offset + 8 : offset + 20] = s15fixed16(columns[b"rgb".index(name[:1])])
    return bytes(profile)


def flat(color: tuple[int, ...], mode: str, **options: Any) -> bytes:
    return encode(Image.new(mode, (SIZE, SIZE), color), **options)


def srgb(data: bytes, decoder: str = "exact") -> list[int]:
    """The one color of an image of one color, in sRGB."""
    crop = decode_image(data, SIZE, LIMIT, decoder, "srgb")
    assert (crop == crop[0, 0]).all()
    return crop[0, 0].tolist()


@pytest.mark.parametrize("color", [(128, 128, 128), (200, 120, 90), (90, 140, 120), (30, 40, 35)])
def test_display_p3_becomes_srgb_by_the_matrices_of_both(color: tuple[int, int, int]) -> None:
    encoded = np.array(color) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    mixed = np.linalg.solve(np.transpose(SRGB_COLUMNS), np.transpose(P3_COLUMNS) @ linear)
    expected = 255 * np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055)
    data = flat(color, "RGB", icc_profile=matrix_profile(P3_COLUMNS))
    for decoder in ("exact", "fast"):
        assert np.abs(srgb(data, decoder) - expected).max() < 1
    np.testing.assert_array_equal(decode_image(data, SIZE, LIMIT)[0, 0], color)


def test_a_profile_reaches_palettes_and_colors_under_alpha() -> None:
    red_is_green = matrix_profile([SRGB_COLUMNS[1], SRGB_COLUMNS[0], SRGB_COLUMNS[2]])
    palette = Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).quantize(4)
    for data in (
        flat((255, 0, 0), "RGB", icc_profile=red_is_green),
        encode(palette, icc_profile=red_is_green),
        flat((255, 0, 0, 255), "RGBA", icc_profile=red_is_green),
    ):
        assert np.abs(np.subtract(srgb(data), (0, 255, 0))).max() <= 1
    half = srgb(flat((255, 0, 0, 128), "RGBA", icc_profile=red_is_green))
    assert np.abs(np.subtract(half, (127, 255, 127))).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK"])
def test_srgb_without_a_profile_that_applies_changes_nothing(mode: str) -> None:
    image = Image.fromarray(noise(2 * SIZE, SIZE)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    plain = encode(image, kind)
    damaged = encode(image, kind, icc_profile=b"no profile")
    of_another_space = matrix_profile(P3_COLUMNS)[:16] + b"LUV " + matrix_profile(P3_COLUMNS)[20:]
    other = encode(image, kind, icc_profile=of_another_space)
    expected = decode_image(plain, SIZE, LIMIT)
    grey = matrix_profile(P3_COLUMNS) if mode in ("L", "LA") else b""
    of_colors = encode(image, kind, icc_profile=grey)
    for data in (plain, damaged, other, of_colors):
        np.testing.assert_array_equal(decode_image(data, SIZE, LIMIT, "exact", "srgb"), expected)
