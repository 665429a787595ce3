"""Versions of the packages that decide a result, as manifests and tracking record them."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Versions by name: Python, and the packages that decide or make latents."""
    names = ("torch", "timm", "pillow", "pyarrow", "numpy", "ray")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}
