"""Is this Ray cluster good for a recipe? Its nodes as they are, and whether the recipe's actors, tasks and shards fit.

Part of `fae doctor`. `Node` is all that the arithmetic knows of a node, so it can be asked about clusters that are not there.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import Recipe
from ..config.sections import TrainingSection
from ..runtime import versions
from .finding import Finding

PROBE_SECONDS = 60.0
QUEUED_PER_ACTOR = 2
"""Shards that Ray Data holds ready for an actor beside the one in work (its default)."""
STORE_SHARE = 0.8


@dataclass(frozen=True)
class Node:
    """One node: resources that Ray gives out, bytes of its object store and of /dev/shm, and versions of its packages."""

    name: str
    cpus: float
    gpus: float = 0.0
    store: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    shm: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        labels = " ".join(f"{k}={v}" for k, v in self.labels.items() if not k.startswith("ray.io/"))
        return f"{self.cpus:g} CPU {self.gpus:g} GPU{' ' if labels else ''}{labels}"


def look_at_nodes() -> tuple[list[Node], list[Finding]]:
    """The alive nodes of the cluster that this process is connected to, each asked by a task that runs on it."""
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
        except Exception as error:  # whatever a node does to a task, it is this node's finding
            nodes.append(made)
            findings.append(
                Finding("problem", "node", f"{name} did not run a task: {_first_line(error)}")
            )
    if dead:
        findings.append(Finding("warning", "nodes", f"{dead} more were lost since the start"))
    return nodes, findings


def check_nodes(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Findings about the cluster itself: what it has, object stores against /dev/shm, equal versions."""
    kinds = Counter(node.kind for node in nodes)
    text = ", ".join(f"{number} × ({kind})" for kind, number in kinds.items())
    yield Finding("ok" if nodes else "problem", "nodes", f"{len(nodes)} alive: {text}")
    for node in nodes:
        if node.shm and node.store > node.shm:
            yield Finding(
                "warning", "/dev/shm",
                f"{node.name}: {_size(node.shm)} for an object store of {_size(node.store)}; Ray puts it on disk, which is slow. "
                "Mount more (Kubernetes: an emptyDir of medium Memory; Docker: --shm-size) or set object-store-memory.",
            )  # fmt: skip
    if nodes and all(node.shm >= node.store for node in nodes if node.shm):
        total = _size(sum(node.store for node in nodes))
        yield Finding("ok", "/dev/shm", f"holds the object stores, {total} together")
    yield from _check_versions(nodes)


def check_fit(
    recipe: Recipe, nodes: Sequence[Node], scaled: dict[str, float] | None = None
) -> Iterator[Finding]:
    """Whether the recipe's precompute and trainings fit on `nodes`, or what is missing; `scaled` is what may still come."""
    options = recipe.precompute
    left = list(nodes)
    actors = _place(left, options.num_actors, options.cpus_per_actor, options.gpus_per_actor)
    yield _fit(
        "actors",
        f"precompute.num_actors={options.num_actors}",
        options.num_actors,
        actors,
        options.cpus_per_actor,
        options.gpus_per_actor,
        scaled or {},
    )
    on = [node for node in left if matches(node, options.decode_labels)]
    labelled = "".join(f" {k}={v}" for k, v in options.decode_labels.items())
    decodes = sum(math.floor(node.cpus / options.cpus_per_decode) for node in on)
    if options.decode_labels and not on:
        there = {f"{k}={v}" for n in nodes for k, v in n.labels.items() if "ray.io/" not in k}
        yield Finding(
            "warning" if scaled else "problem", "decode",
            f"no node has{labelled} (precompute.decode_labels); there are: {', '.join(sorted(there)) or 'no labels'}. "
            "Start nodes with `ray start --labels`, or leave the setting out."
            + (" The autoscaler may still bring one." if scaled else ""),
        )  # fmt: skip
    elif decodes == 0:
        yield Finding(
            "problem", "decode",
            f"no CPU is left for a decode task ({options.cpus_per_decode:g} CPU) beside the actors: the job would wait for "
            "ever. Lower precompute.cpus_per_actor or num_actors, or add a CPU node.",
        )  # fmt: skip
    else:
        yield Finding(
            "ok", "decode", f"{decodes} tasks at once on {len(on)} nodes{' with' if labelled else ''}{labelled}"
        )  # fmt: skip
        yield from _check_gpu_nodes(recipe, nodes)
        yield from _check_store(recipe, nodes, on, decodes)
    trainings: dict[str, TrainingSection] = {
        "autoencoder": recipe.autoencoder.training,
        "pixel_decoder": recipe.pixel_decoder.training,
        "generator": recipe.generator.training,
    }
    for name, training in trainings.items():
        gpus = 1.0 if training.use_gpu else 0.0
        placed = _place(list(nodes), training.num_workers, training.cpus_per_worker, gpus)
        setting = f"{name}.training.num_workers={training.num_workers}"
        yield _fit(
            "training", setting, training.num_workers, placed, training.cpus_per_worker, gpus, scaled or {}
        )  # fmt: skip


def matches(node: Node, selector: dict[str, str]) -> bool:
    """Whether `node` has the labels of a Ray label selector: VALUE, !VALUE, in(A, B), !in(A, B)."""
    for key, wanted in selector.items():
        negative, wanted = wanted.startswith("!"), wanted.removeprefix("!")
        inside = (
            wanted.removeprefix("in(").removesuffix(")") if wanted.startswith("in(") else wanted
        )
        allowed = [value.strip() for value in inside.split(",")]
        if (node.labels.get(key) in allowed) == negative:
            return False
    return True


def _place(left: list[Node], number: int, cpus: float, gpus: float) -> int:
    # How many of `number` fit; what they take is taken from `left`.
    placed = 0
    for index, node in enumerate(left):
        rooms = [
            math.floor(have / need) for have, need in ((node.cpus, cpus), (node.gpus, gpus)) if need
        ]
        here = min(min(rooms, default=number), number - placed)
        left[index] = replace(node, cpus=node.cpus - here * cpus, gpus=node.gpus - here * gpus)
        placed += here
    return placed


def _fit(
    subject: str, setting: str, wanted: int, placed: int, cpus: float, gpus: float, scaled: dict[str, float]
) -> Finding:  # fmt: skip
    each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    if placed == wanted:
        return Finding("ok", subject, f"{setting}, each {each}: fit")
    lacks = "GPU nodes" if gpus else "CPU nodes"
    text = f"{setting}, each {each}: {placed} fit on the nodes that are up."
    if scaled.get("GPU" if gpus else "CPU", 0.0) >= wanted * (gpus or cpus):
        return Finding("warning", subject, f"{text} The autoscaler may bring the missing {lacks}.")
    return Finding(
        "problem", subject,
        f"{text} The rest would wait for ever: {lacks} are missing. Add some, or set {setting.partition('=')[0]}={max(placed, 1)}.",
    )  # fmt: skip


def _check_gpu_nodes(recipe: Recipe, nodes: Sequence[Node]) -> Iterator[Finding]:
    mixed = {node.gpus > 0 for node in nodes if node.cpus} == {True, False}
    if recipe.precompute.gpus_per_actor and not recipe.precompute.decode_labels and mixed:
        yield Finding(
            "warning", "decode",
            "may also run on GPU nodes, whose CPUs the actors need. Label the CPU nodes (ray start --labels fae-nodes=cpu) and set "
            "precompute.decode_labels.fae-nodes=cpu.",
        )  # fmt: skip


def _check_store(
    recipe: Recipe, nodes: Sequence[Node], decoding: Sequence[Node], decodes: int
) -> Iterator[Finding]:
    shard = recipe.precompute.shard_size * recipe.image_size**2 * 3
    flying = decodes + QUEUED_PER_ACTOR * recipe.precompute.num_actors
    store = sum(node.store for node in nodes)
    smallest = min(node.store for node in decoding)
    text = f"a shard is {_size(shard)} (shard_size × image_size² × 3), up to {flying} at once are {_size(flying * shard)}"
    if shard > smallest:
        yield Finding(
            "problem", "object store",
            f"{text}; the smallest node's store has {_size(smallest)}. Lower precompute.shard_size.",
        )  # fmt: skip
    elif flying * shard > STORE_SHARE * store:
        yield Finding(
            "warning", "object store",
            f"{text}; the stores have {_size(store)}. Ray will hold decoding back or spill to disk. Lower "
            "precompute.shard_size, raise cpus_per_decode, or give the nodes more.",
        )  # fmt: skip
    else:
        yield Finding("ok", "object store", f"{text} of {_size(store)}")


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
            f"{'; '.join(different)}; here: {ours}. Give all nodes one image.",
        )
    elif any(node.versions for node in nodes):
        shown = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "torch"))
        yield Finding("ok", "versions", f"equal on all nodes: {shown}")


def _facts() -> dict[str, Any]:
    # Runs on the node.
    found = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {"shm": found.f_blocks * found.f_frsize if found else 0, "versions": versions()}


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
