"""What comes with the package at addresses that begin with `shipped:`: trained networks and images.

Networks are a folder that `fae publish --half` wrote, so every key that names a checkpoint takes
its address. Images are a folder for `data.path`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..storage import paths


@dataclass(frozen=True)
class Shipped:
    """A folder of the package: its address, and what is in it in one line."""

    address: str
    about: str


def describe_shipped() -> list[Shipped]:
    """The folders under `shipped:`, by name."""
    root = Path(paths.filesystem(paths.SHIPPED)[1])
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    return [Shipped(f"{paths.SHIPPED}{folder.name}", _about(folder)) for folder in folders]


def _about(folder: Path) -> str:
    account = folder / "fae.json"
    if account.exists():
        networks = json.loads(account.read_text())["networks"]
        sizes = [f"{n} ({v['num_parameters'] / 1e6:.1f} M)" for n, v in networks.items()]
        return f"Trained networks: {', '.join(sizes)}"
    metadata = folder.rglob("metadata.jsonl")
    num_images = sum(len(file.read_bytes().splitlines()) for file in metadata)
    return f"{num_images} captioned images"
