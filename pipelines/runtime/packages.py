"""Versions of the packages that decide a result: recorded by manifests, equal on all nodes."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping

from fae_core.errors import UserError

from .lanes import ask_every_node, this_node


class OtherVersions(UserError, RuntimeError):
    """A node has other versions of the packages that decide a result than this process."""


def versions() -> dict[str, str]:
    """Versions by name: Python, and the packages that decide or make latents."""
    names = ("torch", "timm", "pillow", "pyarrow", "numpy", "ray")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def refuse_other_versions() -> None:
    """Raises OtherVersions where a node of the connected cluster has other ones than `versions`.

    Nodes that do not answer are passed over. Those that join later are not asked; what runs there
    calls `refuse_this_node`.
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


def refuse_this_node(expected: Mapping[str, str]) -> None:
    """Raises OtherVersions where this process has other versions than those `expected`."""
    if found := differing(_own_versions(), expected):
        theirs = ", ".join(f"{name} {version}" for name, version in expected.items())
        raise OtherVersions(
            f"{this_node()}it has {found}; the job was started with {theirs}. Use one image on all "
            "nodes, then run the same command again: it resumes."
        )


@functools.cache
def _own_versions() -> dict[str, str]:
    return versions()


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """The names and versions of `there` that are others than `here`."""
    return ", ".join(
        f"{name} {there.get(name)}" for name, version in here.items() if there.get(name) != version
    )
