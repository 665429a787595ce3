"""The nodes of a Ray cluster as `fae doctor` sees them: resources, object stores, package versions.

`Node` holds everything that the later checks need, so they also run on clusters that do not exist.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..runtime.lanes import ask_every_node
from ..runtime.packages import differing, versions
from .finding import Finding, size_text

FREE_SHARE = 0.05
"""Ray refuses objects where less of a disk is free."""
CLOCK_SECONDS = 120.0
"""Clocks may differ by so much; an answer of a busy node may take half of it."""


@dataclass(frozen=True)
class Node:
    """One node of the cluster; sizes are in bytes."""

    name: str
    cpus: float
    gpus: float = 0.0
    store: float = 0.0
    """Size of the object store."""
    labels: dict[str, str] = field(default_factory=dict)
    shm: float = 0.0
    """Size of /dev/shm; 0 if the node did not answer or has none."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package versions by name; empty if the node did not answer."""
    clock_ahead: float = 0.0
    """Seconds by which its clock is ahead of this process's."""
    disk: tuple[str, float, float] | None = None
    """Its temporary directory, and the free and all bytes of the disk below."""

    @property
    def kind(self) -> str:
        """CPUs, GPUs and labels; equal for nodes of one kind. Ray's own labels are left out."""
        labels = " ".join(f"{k}={v}" for k, v in self.labels.items() if not k.startswith("ray.io/"))
        return f"{self.cpus:g} CPU {self.gpus:g} GPU{' ' if labels else ''}{labels}"


def look_at_nodes() -> tuple[list[Node], list[Finding]]:
    """The alive nodes of the connected cluster, and what is wrong with any of them.

    A small task runs on each node. A node that does not run it is a problem.
    """
    import ray

    dead = sum(not node["Alive"] for node in ray.nodes())
    nodes, findings = [], []
    for answer in ask_every_node(_facts):
        resources = answer.node["Resources"]
        made = Node(
            answer.address,
            resources.get("CPU", 0.0),
            resources.get("GPU", 0.0),
            resources.get("object_store_memory", 0.0),
            dict(answer.node["Labels"]),
        )
        if answer.error is None:
            values = dict(answer.value)
            ahead = values.pop("clock") - time.time()
            made = replace(made, clock_ahead=ahead, **values)
        else:
            message = f"{made.name} did not run a task: {_first_line(answer.error)}"
            findings.append(Finding("problem", "node", message))
        nodes.append(made)
    if dead:
        message = f"{dead} nodes were lost since the cluster started"
        findings.append(Finding("warning", "nodes", message))
    return nodes, findings


def check_nodes(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Findings about the nodes: their kinds, /dev/shm, disks, clocks, equal package versions."""
    kinds = Counter(node.kind for node in nodes)
    text = ", ".join(f"{number} × ({kind})" for kind, number in kinds.items())
    yield Finding("ok" if nodes else "problem", "nodes", f"{len(nodes)} alive: {text}")
    for node in nodes:
        if node.shm and node.store > node.shm:
            yield Finding(
                "warning",
                "/dev/shm",
                f"{node.name} has {size_text(node.shm)} for an object store of "
                f"{size_text(node.store)}. Ray then keeps the store on disk, which is slow. "
                "Mount more (Kubernetes: an emptyDir of medium Memory; Docker: --shm-size) "
                "or lower object-store-memory.",
            )
    if nodes and all(node.shm >= node.store for node in nodes if node.shm):
        total = size_text(sum(node.store for node in nodes))
        yield Finding("ok", "/dev/shm", f"holds the object stores, {total} together")
    yield from _check_disks(nodes)
    yield from _check_clocks(nodes)
    yield from _check_versions(nodes)


def _check_disks(nodes: Sequence[Node]) -> Iterator[Finding]:
    full = [node for node in nodes if node.disk and node.disk[1] < FREE_SHARE * node.disk[2]]
    for node in full:
        assert node.disk
        folder, free, size = node.disk
        yield Finding(
            "problem",
            "disk",
            f"{node.name} has {size_text(free)} of {size_text(size)} free below {folder}. Ray "
            "refuses objects on a disk that is 95 % full, and checkpoints on their way to S3 need "
            "room. Free some, or set TMPDIR and `ray start --temp-dir` to a larger disk.",
        )
    if not full and any(node.disk for node in nodes):
        least = min(node.disk[1] for node in nodes if node.disk)
        yield Finding("ok", "disk", f"at least {size_text(least)} free on each node")


def _check_clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    wrong = [node for node in nodes if abs(node.clock_ahead) > CLOCK_SECONDS]
    for node in wrong:
        side = "ahead of" if node.clock_ahead > 0 else "behind"
        yield Finding(
            "problem",
            "clock",
            f"{node.name} is {abs(node.clock_ahead):.0f} s {side} this process. S3 refuses "
            "requests from clocks that are 15 minutes off. Set up NTP on the nodes.",
        )
    if nodes and not wrong:
        yield Finding("ok", "clock", "the same on all nodes, to two minutes")


def _check_versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    here = versions()
    different = [
        f"{node.name} has {other}"
        for node in nodes
        if node.versions and (other := differing(node.versions, here))
    ]
    if different:
        ours = ", ".join(f"{name} {version}" for name, version in here.items())
        yield Finding(
            "problem",
            "versions",
            f"{'; '.join(different)}; this process has {ours}. Use one image on all nodes.",
        )
    elif any(node.versions for node in nodes):
        shown = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "torch"))
        yield Finding("ok", "versions", f"equal on all nodes: {shown}")


def _facts() -> dict[str, Any]:
    """What a node can only say itself: bytes of /dev/shm, disk, clock, and package versions."""
    found = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    return {
        "shm": found.f_blocks * found.f_frsize if found else 0,
        "versions": versions(),
        "clock": time.time(),
        "disk": (folder, disk.free, disk.total),
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
