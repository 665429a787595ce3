"""The nodes of a Ray cluster as `fae doctor` sees them: resources, object stores, package versions.

`Node` holds everything that the later checks need, so they also run on clusters that do not exist.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..runtime import versions
from .finding import Finding, size_text

PROBE_SECONDS = 60.0
"""How long all nodes together have to run one small task each."""


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

    @property
    def kind(self) -> str:
        """CPUs, GPUs and labels; equal for nodes of one kind. Ray's own labels are left out."""
        labels = " ".join(f"{k}={v}" for k, v in self.labels.items() if not k.startswith("ray.io/"))
        return f"{self.cpus:g} CPU {self.gpus:g} GPU{' ' if labels else ''}{labels}"


def look_at_nodes() -> tuple[list[Node], list[Finding]]:
    """The alive nodes of the connected cluster, and what is wrong with any of them.

    A small task runs on each node. A node that does not run it within PROBE_SECONDS is a problem.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    dead = len(ray.nodes()) - len(alive)
    facts = ray.remote(num_cpus=0, max_retries=0)(_facts)
    asked = {
        facts.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): node
        for node in alive
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    nodes, findings = [], []
    for reference, node in asked.items():
        resources = node["Resources"]
        name = f"{node['NodeManagerAddress']}"
        made = Node(
            name,
            resources.get("CPU", 0.0),
            resources.get("GPU", 0.0),
            resources.get("object_store_memory", 0.0),
            dict(node["Labels"]),
        )
        try:
            found = ray.get(reference, timeout=0.1)
            nodes.append(replace(made, shm=found["shm"], versions=found["versions"]))
        except Exception as error:  # Whatever a task raises says something about this node.
            nodes.append(made)
            findings.append(
                Finding("problem", "node", f"{name} did not run a task: {_first_line(error)}")
            )
    if dead:
        message = f"{dead} nodes were lost since the cluster started"
        findings.append(Finding("warning", "nodes", message))
    return nodes, findings


def check_nodes(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Findings about the nodes themselves: their kinds, /dev/shm, and equal package versions."""
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
    yield from _check_versions(nodes)


def _check_versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    here = versions()
    different = [
        f"{node.name} has {name} {node.versions.get(name)}"
        for node in nodes
        if node.versions
        for name, version in here.items()
        if node.versions.get(name) != version
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
    """What a node can only say itself: bytes of /dev/shm, and package versions."""
    found = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {"shm": found.f_blocks * found.f_frsize if found else 0, "versions": versions()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
