"""What every benchmark prints with its figures, and the photographs that it uses."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fae_core.errors import UserError

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError ends it with the message alone and exit status 2, as in `fae`."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def describe() -> str:
    """One line with the GPU or processor, the number of cores, and versions."""
    names = ("torch", "ray", "timm", "pillow", "pyarrow")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{device}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")


def write_photographs(
    folder: Path, count: int, size: tuple[int, int] = (500, 375), **options: int | str
) -> None:
    """Write `count` JPEGs cropped from scikit-image's photographs, the same at each call.

    `size` [px] has the ratio 4 : 3; the default is ImageNet's usual size. `options` are those of
    Pillow's JPEG writer.
    """
    import skimage.data

    folder.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    random = np.random.default_rng(0)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        height = int(min(picture.height, picture.width * 3 // 4) * random.uniform(0.5, 1.0))
        width = height * 4 // 3
        left = int(random.integers(0, picture.width - width + 1))
        top = int(random.integers(0, picture.height - height + 1))
        crop = picture.crop((left, top, left + width, top + height)).resize(size)
        crop.save(folder / f"{index:06d}.jpg", quality=92, **options)
