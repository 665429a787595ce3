"""Images per second that one core decodes and crops, by decoder, and the error of each crop.

    python -m benchmarks.decode [--images 24] [--rounds 10]

The images are photographs as JPEGs of ImageNet's usual size, in three chroma subsamplings and
progressive, cropped to 256 px. Decoders that can halve while they decode also crop to 128 px, from
a size that halves evenly and from one that does not. Processor time of one thread is measured, so
other work on the machine has little effect. A method's time is the sum over images of the best
round of each, and the rounds of all methods alternate. Errors are those against Pillow with ADM's
crop, of the pixels and of DINOv2-S's features. simplejpeg is measured where it is installed, nvJPEG
where there is a GPU.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.environment import describe, write_photographs
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.crops import adm_center_crop, decode_image, fast_center_crop
from fae.pipelines.networks.loading import backbone_of
from fae_core.backbone import Backbone

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

EXACT = "Pillow, ADM's crop (`exact`)"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
"""sRGB's profile and one that changes colors, because two of its primaries are exchanged."""
SETS: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {
    "500x375, 4:4:4, to 256": (256, (500, 375), {"subsampling": "4:4:4"}),
    "500x375, 4:2:2, to 256": (256, (500, 375), {"subsampling": "4:2:2"}),
    "500x375, 4:2:0, to 256": (256, (500, 375), {"subsampling": "4:2:0"}),
    "500x375, 4:2:0, sRGB profile, to 256": (256, (500, 375), {"icc_profile": SRGB}),
    "500x375, 4:2:0, another profile, to 256": (256, (500, 375), {"icc_profile": SWAPPED}),
    "500x375, 4:2:0, progressive, to 256": (256, (500, 375), {"progressive": 1}),
    "512x384, 4:2:0, to 128": (128, (512, 384), {"subsampling": "4:2:0"}),
    "500x375, 4:2:0, to 128": (128, (500, 375), {"subsampling": "4:2:0"}),
}
"""Title -> size of the crop, size of the image, and the options of Pillow's JPEG writer."""

Method = Callable[[bytes], np.ndarray]


@dataclass
class Row:
    """One method on one set of images; rates are in images per second on one core."""

    name: str
    decode_rate: float
    rate: float
    maximum: int
    mean: float
    feature_error: float
    cosine: float


def pillow(data: bytes, halve_to: int = 0) -> Image.Image:
    """The image by Pillow, in RGB.

    With `halve_to` libjpeg halves it while decoding, as often as both sides stay at least so long.
    """
    image = Image.open(io.BytesIO(data))
    if halve_to:
        image.draft("RGB", (halve_to, halve_to))
    return image.convert("RGB")


def torchvision(data: bytes, device: str = "cpu") -> Image.Image:
    """The image by torchvision, in RGB: by libjpeg-turbo, or on a GPU by nvJPEG."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def turbo(data: bytes, fast: bool = False) -> Image.Image:
    """The image by simplejpeg; `fast` uses libjpeg-turbo's faster, coarser transform and chroma."""
    return Image.fromarray(simplejpeg.decode_jpeg(data, fastdct=fast, fastupsample=fast))


def turbo_scaled(data: bytes, size: int) -> Image.Image:
    """The image by simplejpeg, scaled by libjpeg-turbo.

    It has the smallest number of eighths of its size for which no side is shorter than `size`.
    """
    return Image.fromarray(simplejpeg.decode_jpeg(data, min_height=size, min_width=size))


def methods(size: int, halves: bool) -> dict[str, tuple[Callable[[bytes], Image.Image], Method]]:
    """Name -> (decoding, decoding and cropping), the exact method first."""
    made: dict[str, tuple[Callable[[bytes], Image.Image], Method]] = {
        EXACT: (pillow, lambda data: decode_image(data, size, 10**8)),
        "Pillow, torch's filter (`fast`)": (
            pillow,
            lambda data: decode_image(data, size, 10**8, "fast"),
        ),
        "Pillow, ADM's crop, profile to sRGB": (
            pillow,
            lambda data: decode_image(data, size, 10**8, "exact", "srgb"),
        ),
    }
    decoders = {"torchvision": torchvision}
    if simplejpeg is not None:
        decoders |= {"simplejpeg": turbo, "simplejpeg, coarse": lambda data: turbo(data, True)}
    if torch.cuda.is_available():
        decoders["nvJPEG"] = lambda data: torchvision(data, "cuda")
    if halves:
        decoders = {"Pillow, halved while decoding": lambda data: pillow(data, size)}
        if simplejpeg is not None:
            decoders["simplejpeg, scaled while decoding"] = lambda data: turbo_scaled(data, size)
    for name, decode in decoders.items():
        made[f"{name}, ADM's crop"] = (decode, lambda d, f=decode: adm_center_crop(f(d), size))
        made[f"{name}, torch's filter"] = (decode, lambda d, f=decode: fast_center_crop(f(d), size))
    return made


def measure(
    size: int, halves: bool, images: list[bytes], rounds: int, backbone: Backbone
) -> list[Row]:
    """One row for each method, the exact method first."""
    every = methods(size, halves)
    best = {name: np.full((2, len(images)), np.inf) for name in every}
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, both in every.items():
            for kind, run in enumerate(both):
                for index, data in enumerate(images):
                    started = time.process_time()
                    run(data)
                    seconds = time.process_time() - started
                    best[name][kind, index] = min(best[name][kind, index], seconds)
    torch.set_num_threads(os.cpu_count() or 1)
    exact = np.stack([every[EXACT][1](data) for data in images])
    exact_features = features(backbone, exact)
    rows = []
    for name, (_, run) in every.items():
        crops = np.stack([run(data) for data in images])
        error = np.abs(crops.astype(int) - exact)
        relative, cosine = 0.0, 1.0
        if error.any():
            theirs = features(backbone, crops)
            relative = float((theirs - exact_features).norm() / exact_features.norm())
            cosine = float(torch.cosine_similarity(theirs, exact_features, dim=-1).mean())
        decode_rate, rate = (len(images) / seconds for seconds in best[name].sum(axis=1))
        rows.append(
            Row(name, decode_rate, rate, int(error.max()), float(error.mean()), relative, cosine)
        )
    return rows


@torch.inference_mode()
def features(backbone: Backbone, crops: np.ndarray) -> torch.Tensor:
    """Patch features [n, N, D] float32."""
    return torch.cat(
        [backbone(torch.from_numpy(crops[i : i + 8])) for i in range(0, len(crops), 8)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    backbone = backbone_of(load_recipe("photos-dinov2s"))
    print(f"{describe()}\n{arguments.images} images a set, best of {arguments.rounds} rounds")
    if not torch.cuda.is_available():
        print("nvJPEG: not measured (no GPU)")
    if simplejpeg is None:
        print("simplejpeg: not measured (not installed; it is in the extra `dev`)")
    for title, (size, shape, options) in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(Path(folder), arguments.images, shape, **options)
            images = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
        rows = measure(size, min(shape) >= 2 * size, images, arguments.rounds, backbone)
        print(f"\n{title}\n")
        print(
            "| decoder, crop | decode/s | decode and crop/s | times exact | largest error "
            "| mean error | features: relative error | cosine |\n|---|---|---|---|---|---|---|---|"
        )
        for row in rows:
            print(
                f"| {row.name} | {row.decode_rate:.0f} | {row.rate:.0f} "
                f"| {row.rate / rows[0].rate:.2f} | {row.maximum} | {row.mean:.4f} "
                f"| {row.feature_error:.1e} | {row.cosine:.6f} |"
            )


if __name__ == "__main__":
    main()
