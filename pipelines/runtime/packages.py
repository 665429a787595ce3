"""Versions of the packages that decide a result: recorded by manifests, equal on all nodes."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

from fae_core.errors import UserError

from .lanes import ask_every_node


class OtherVersions(UserError, RuntimeError):
    """A node has other versions of the packages that decide a result than this process."""


def versions() -> dict[str, str]:
    """Versions by name: Python, and the packages that decide or make latents."""
    names = ("torch", "timm", "pillow", "pyarrow", "numpy", "ray")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def refuse_other_versions() -> None:
    """Raises OtherVersions where a node of the connected cluster has other ones than `versions`.

    Nodes that do not answer are passed over, and those that join later are not asked.
    """
    here = versions()
    answers = [answer for answer in ask_every_node(versions) if answer.error is None]
    if found := "; ".join(
        f"node {answer.address} has {other}"
        for answer in answers
        if (other := differing(answer.value, here))
    ):
        ours = ", ".join(f"{name} {version}" for name, version in here.items())
        raise OtherVersions(
            f"{found}; this process has {ours}. The latents of one job would come from both. Use "
            "one image on all nodes."
        )


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """The names and versions of `there` that are others than `here`."""
    return ", ".join(
        f"{name} {there.get(name)}" for name, version in here.items() if there.get(name) != version
    )
