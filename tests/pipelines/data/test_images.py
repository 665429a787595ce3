"""Every kind of source gives its records and bytes, every bad input its outcome.

The crop equals one written here from ADM's definition; what S3 gives equals what a folder gives.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.crops import (
    ImageError,
    adm_center_crop,
    decode_image,
    decode_records,
    fast_center_crop,
)
from fae.pipelines.data.reading import read_records
from fae.pipelines.data.records import ImageRecord, SourceError
from fae.pipelines.data.sources import list_images
from fae.pipelines.storage import paths

SIZE = 32
LIMIT = 1_000_000


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values[..., 0] if channels == 1 else values


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def plan(path: Path | str, **fields: Any) -> list[ImageRecord]:
    return list_images(DataSection(path=str(path), **fields))


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


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


def test_every_record_ends_as_a_crop_or_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encode(noise(40, 50)))
    put(tmp_path / "b.jpg", b"")
    put(tmp_path / "c.jpg", b"text")
    put(tmp_path / "d.png", encode(noise(50, 40)))
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    (tmp_path / "d.png").unlink()
    images, kept, errors = decode_records(records, read_records(records, data), SIZE, data)
    assert images.shape == (1, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert kept == [0]
    stages = [(error["key"], error["stage"]) for error in errors]
    assert stages == [("b.jpg", "decode"), ("c.jpg", "decode"), ("d.png", "read")]
    again = decode_records(records, read_records(records, data), SIZE, data)[2]
    assert again == errors


def test_no_good_image_gives_an_empty_batch() -> None:
    images, kept, errors = decode_records([ImageRecord("k", "u")], [b""], SIZE, DataSection())
    assert (images.shape, kept, len(errors)) == ((0, SIZE, SIZE, 3), [], 1)


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


# Folders


def test_class_folders_give_labels_in_name_order(tmp_path: Path) -> None:
    for name in (
        "dog/1.JPG",
        "cat/deep/2.png",
        "cat/naïve cat 猫.webp",
        ".hidden/3.png",
        "dog/.4.png",
    ):
        put(tmp_path / name, b"x")
    put(tmp_path / "notes.txt", b"x")
    assert [(r.key, r.label) for r in plan(tmp_path)] == [
        ("cat/deep/2.png", 0),
        ("cat/naïve cat 猫.webp", 0),
        ("dog/1.JPG", 1),
    ]


def test_an_image_beside_class_folders_has_no_label_and_the_others_keep_theirs(
    tmp_path: Path,
) -> None:
    put(tmp_path / "a b é.jpg", b"one")
    put(tmp_path / "folder/c.jpg", b"two")
    records = plan(tmp_path)
    assert [r.label for r in records] == [None, 0]
    assert [r.label for r in plan(tmp_path, label_column=None)] == [None, None]
    assert read_records(records, DataSection()) == [b"one", b"two"]


def test_limit_takes_the_first_in_key_order(tmp_path: Path) -> None:
    for name in ("c.jpg", "a.jpg", "b.jpg"):
        put(tmp_path / name, b"x")
    assert [r.key for r in plan(tmp_path, limit=2)] == ["a.jpg", "b.jpg"]


def test_a_source_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        plan(tmp_path / "none")
    with pytest.raises(SourceError, match="no images"):
        plan(tmp_path)
    with pytest.raises(SourceError, match="data.path is not set"):
        list_images(DataSection())


def test_two_kinds_in_one_folder_ask_for_a_format(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", b"x")
    make_tar(tmp_path / "b.tar", {"c.jpg": b"x"})
    with pytest.raises(SourceError, match="Set data.format"):
        plan(tmp_path)
    assert [r.key for r in plan(tmp_path, format="webdataset")] == ["b.tar/c"]


# Parquet


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_rows_have_keys_in_row_order_and_give_their_bytes(
    tmp_path: Path, nested: bool
) -> None:
    blobs = [f"image {i}".encode() for i in range(12)]
    cells: list[Any] = [{"bytes": b, "path": None} for b in blobs] if nested else list(blobs)
    cells[5] = None
    table = pa.table({"image": cells, "label": [*range(11), None], "caption": ["é"] * 12})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    assert [r.key for r in records] == [f"x.parquet#{i:08d}" for i in range(12)]
    assert records[11].uri == f"{tmp_path}/x.parquet#row=11"
    assert ([r.label for r in records], records[0].caption) == ([*range(11), None], "é")
    order = [11, 0, 5, 7]
    read = read_records([records[i] for i in order], data)
    assert [read[0], read[1], read[3]] == [blobs[11], blobs[0], blobs[7]]
    assert isinstance(read[2], ImageError)


def test_a_struct_without_bytes_reads_the_path_beside_its_file(tmp_path: Path) -> None:
    put(tmp_path / "files/a.jpg", b"beside")
    cells = [{"bytes": None, "path": "files/a.jpg"}, {"bytes": None, "path": "../../etc/passwd"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "x.parquet")
    data = DataSection(path=str(tmp_path / "x.parquet"))
    first, second = read_records(list_images(data), data)
    assert first == b"beside"
    assert isinstance(second, SourceError)


def test_parquet_planning_names_wrong_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "klass": [1]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="'imag'.*image_column.*Did you mean 'image'"):
        plan(tmp_path, image_column="imag")
    with pytest.raises(SourceError, match="key_column"):
        plan(tmp_path, key_column="id")
    with pytest.raises(SourceError, match="label_column.*klass"):
        plan(tmp_path, label_column="class")
    assert plan(tmp_path, label_column="klass")[0].label == 1


def test_the_same_key_twice_is_refused_with_both_addresses(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"image": [b"x"], "id": ["same"]}), tmp_path / name)
    with pytest.raises(SourceError, match=r"'same'.*a\.parquet#row=0.*b\.parquet#row=0"):
        plan(tmp_path, key_column="id")


def test_rows_and_files_that_vanish_fail_alone(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"image": [b"0", b"1"]}), tmp_path / name)
    data = DataSection(path=str(tmp_path))
    records = list_images(data)
    pq.write_table(pa.table({"image": [b"0"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").unlink()
    read = read_records(records, data)
    assert read[0] == b"0"
    assert "row 1 is gone" in str(read[1])
    assert all(isinstance(item, paths.StorageError) and "404" in str(item) for item in read[2:])


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "x.parquet", b"no parquet at all")
    with pytest.raises(SourceError, match=r"x\.parquet is not readable Parquet"):
        plan(tmp_path)


# WebDataset


def test_tar_members_are_grouped_by_name_and_read_by_range(tmp_path: Path) -> None:
    members = {
        "d/one.jpg": b"first",
        "d/one.cls": b"7\n",
        "d/one.txt": b"a caption\n",
        "two.json": json.dumps({"label": 3, "caption": "from json"}).encode(),
        "two.PNG": b"second",
        "../three.webp": b"third",
        "four.txt": b"no image",
        "._two.png": b"hidden",
    }
    make_tar(tmp_path / "s.tar", members)
    data = DataSection(path=str(tmp_path / "s.tar"))
    records = list_images(data)
    assert [(r.key, r.label, r.caption) for r in records] == [
        ("s.tar/../three", None, None),
        ("s.tar/d/one", 7, "a caption"),
        ("s.tar/two", 3, "from json"),
    ]
    assert read_records(records, data) == [b"third", b"first", b"second"]


def test_tar_shards_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "gz/a.tar.gz", b"x")
    with pytest.raises(SourceError, match="compressed tar"):
        plan(tmp_path / "gz")
    put(tmp_path / "text/a.tar", b"x" * 2000)
    with pytest.raises(SourceError, match="not a readable WebDataset shard"):
        plan(tmp_path / "text")
    make_tar(tmp_path / "c.tar", {"a.jpg": b"x", "a.cls": b"dog", "b.jpg": b"x", "b.cls": b"1"})
    with pytest.raises(SourceError, match="numbers .* and some are names \\('dog'\\)"):
        plan(tmp_path / "c.tar")
    make_tar(tmp_path / "d.tar", {"a.jpg": b"x", "a.left.jpg": b"y"})
    with pytest.raises(SourceError, match="jpg, left.jpg. Set data.members"):
        plan(tmp_path / "d.tar")


def test_a_tar_cut_after_planning_gives_errors_of_its_records(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    data = DataSection(path=str(path))
    records = list_images(data)
    path.write_bytes(path.read_bytes()[:2200])
    first, second = read_records(records, data)
    assert first == b"a" * 600
    assert isinstance(second, ImageError)


# Lists


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_csv_list_resolves_addresses_against_its_folder(tmp_path: Path) -> None:
    put(tmp_path / "in/a b.jpg", b"relative")
    other = put(tmp_path / "other/é.jpg", b"absolute")
    rows = [
        ["uri", "label", "caption"],
        ["./a b.jpg", "4", 'says "hi", twice'],
        [str(other), "", ""],
    ]
    data = DataSection(path=str(write_csv(tmp_path / "in/list.csv", rows)))
    records = list_images(data)
    assert {(r.key, r.label, r.caption) for r in records} == {
        ("./a b.jpg", 4, 'says "hi", twice'),
        (str(other), None, None),
    }
    assert read_records(records, data) == [b"relative", b"absolute"]


def test_a_parquet_list_is_recognized_and_takes_its_key_column(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", b"content")
    pq.write_table(pa.table({"uri": ["a.jpg"], "id": [17]}), tmp_path / "list.parquet")
    data = DataSection(path=str(tmp_path / "list.parquet"), key_column="id")
    records = list_images(data)
    assert records == [ImageRecord("17", str(tmp_path / "a.jpg"))]
    assert read_records(records, data) == [b"content"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["uri"], ["x/../../secret.jpg"]], "leaves"),
        ([["uri"], ["https://example.org/a.jpg"]], "neither a path nor s3"),
        ([["url"], ["a.jpg"]], "uri_column.*Did you mean 'url'"),
        ([["uri", "label"], ["a.jpg", "dog"], ["b.jpg", "1"]], "numbers .* names \\('dog'\\)"),
        ([["uri", "label"], ["", "1"]], "no value in column 'uri'"),
        ([["uri"], ["a.jpg"], ["a.jpg"]], "'a.jpg' occurs twice"),
        ([["uri"]], "no images"),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        plan(write_csv(tmp_path / "list.csv", rows))


# S3 gives what a local folder gives; `root` runs each test on both


def test_a_tree_reads_alike_locally_and_on_s3(root: str) -> None:
    for name in ("cat/a b é.jpg", "dog/c.png"):
        paths.write_bytes(paths.join(root, "tree", name), name.encode())
    data = DataSection(path=paths.join(root, "tree"))
    records = list_images(data)
    assert [(r.key, r.label) for r in records] == [("cat/a b é.jpg", 0), ("dog/c.png", 1)]
    vanished = ImageRecord("gone", paths.join(root, "tree/gone.jpg"))
    first, second, third = read_records([*records, vanished], data)
    assert (first, second) == ("cat/a b é.jpg".encode(), b"dog/c.png")
    assert isinstance(third, paths.StorageError)


def test_shards_and_lists_read_alike_locally_and_on_s3(root: str, tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "made.tar", {"a.cls": b"1", "a.jpg": b"aa", "b/c.jpg": b"cc"})
    pq.write_table(pa.table({"image": [b"0", b"1"]}), tmp_path / "made.pq")
    paths.write_bytes(paths.join(root, "wds/s.tar"), shard.read_bytes())
    paths.write_bytes(paths.join(root, "pq/x.parquet"), (tmp_path / "made.pq").read_bytes())
    paths.write_bytes(paths.join(root, "tree/c.jpg"), b"listed")
    paths.write_bytes(paths.join(root, "tree/list.csv"), b"uri,label\nc.jpg,5\n")
    expected = {"wds": [b"aa", b"cc"], "pq": [b"0", b"1"], "tree/list.csv": [b"listed"]}
    for path, blobs in expected.items():
        data = DataSection(path=paths.join(root, path))
        assert read_records(list_images(data), data) == blobs


def test_images_imports_without_ray() -> None:
    modules = "fae.pipelines.data.crops, fae.pipelines.data.reading"
    code = f"import sys, {modules}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tasks_that_decode_and_write_start_without_torch():
    """Each of a node's decoding processes would hold 400 MiB more, and start four seconds later."""
    rooms = ("latents.tasks", "evaluation.tasks", "data.decoding", "sampling.sample_store")
    modules = ", ".join(f"fae.pipelines.{name}" for name in rooms)
    code = f"import sys, {modules}; print({{'torch', 'timm', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
