"""Whether a recipe's jobs fit a Ray cluster: actors, decode tasks, shards in flight, training.

Part of `fae doctor`. It is arithmetic on the nodes of `nodes.py` and starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..config import Recipe
from ..config.sections import PrecomputeSection, TrainingSection
from ..data.decoding import DECODE_CPUS
from ..runtime.lanes import Room, place
from .finding import Finding, size_text
from .nodes import Node

QUEUED_PER_ACTOR = 2
"""Shards that Ray Data queues for an actor besides the one in work; Ray Data's default."""
STORE_SHARE = 0.8
"""Share of the object stores that shards may fill before the check warns."""


def check_fit(
    recipe: Recipe, nodes: Sequence[Node], scaled: dict[str, float] | None = None
) -> Iterator[Finding]:
    """Whether the recipe's precompute and each of its trainings fit on `nodes`.

    `scaled` is the most that the autoscaler may bring up, by resource, infinite where it does not
    say. What only those resources can hold is a warning instead of a problem.
    """
    scaled = scaled or {}
    yield from _check_precompute(recipe.precompute, recipe.image_size, nodes, scaled)
    trainings: dict[str, TrainingSection] = {
        "autoencoder": recipe.autoencoder.training,
        "pixel_decoder": recipe.pixel_decoder.training,
        "generator": recipe.generator.training,
    }
    for name, training in trainings.items():
        gpus = 1.0 if training.use_gpu else 0.0
        count, cpus = training.fewest_workers, training.cpus_per_worker
        placed, left = place(_rooms(nodes), count, cpus, gpus)
        key = "num_workers" if count == training.num_workers else "min_workers"
        setting = f"{name}.training.{key}={count}"
        yield _fit("training", setting, count, placed, cpus, gpus, scaled)
        reads_images = name != "generator"
        if reads_images and placed == count and all(room.cpus < DECODE_CPUS for room in left):
            yield Finding(
                "warning" if scaled else "problem",
                "training",
                f"{setting}, each {cpus:g} CPU, leave no {DECODE_CPUS:g} CPU for a task that "
                f"decodes: the training would wait for ever. Lower {name}.training."
                "cpus_per_worker, or add a CPU node.",
            )


def matches(node: Node, selector: dict[str, str]) -> bool:
    """Whether `node` matches a Ray label selector: VALUE, !VALUE, in(A, B) or !in(A, B)."""
    for key, wanted in selector.items():
        negative, wanted = wanted.startswith("!"), wanted.removeprefix("!")
        inside = (
            wanted.removeprefix("in(").removesuffix(")") if wanted.startswith("in(") else wanted
        )
        allowed = [value.strip() for value in inside.split(",")]
        if (node.labels.get(key) in allowed) == negative:
            return False
    return True


def _check_precompute(
    options: PrecomputeSection,
    image_size: int,
    nodes: Sequence[Node],
    scaled: dict[str, float],
) -> Iterator[Finding]:
    count, cpus, gpus = options.num_actors, options.cpus_per_actor, options.gpus_per_actor
    actors, left = place(_rooms(nodes), count, cpus, gpus)
    yield _fit("actors", f"precompute.num_actors={count}", count, actors, cpus, gpus, scaled)
    on = [node for node in nodes if matches(node, options.decode_labels)]
    labels = "".join(f" {k}={v}" for k, v in options.decode_labels.items())
    decodes = sum(
        math.floor(room.cpus / options.cpus_per_decode)
        for node, room in zip(nodes, left, strict=True)
        if matches(node, options.decode_labels)
    )
    if options.decode_labels and not on:
        found = {f"{k}={v}" for n in nodes for k, v in n.labels.items() if "ray.io/" not in k}
        yield Finding(
            "warning" if scaled else "problem",
            "decode",
            f"no node has{labels} (precompute.decode_labels). The nodes have: "
            f"{', '.join(sorted(found)) or 'no labels'}. Start nodes with `ray start --labels`, "
            "or remove the setting."
            + (" The autoscaler may still start such a node." if scaled else ""),
        )
    elif decodes == 0:
        text = (
            f"no CPU is left for a decode task ({options.cpus_per_decode:g} CPU) beside the actors"
        )
        if scaled.get("CPU", 0.0) > sum(node.cpus for node in nodes):
            yield Finding("warning", "decode", f"{text}. {_may_start('CPU nodes', scaled['CPU'])}")
        else:
            yield Finding(
                "problem",
                "decode",
                f"{text}: the job would wait for ever. Lower precompute.cpus_per_actor or "
                "num_actors, or add a CPU node.",
            )
    else:
        labelled = f" with{labels}" if labels else ""
        yield Finding("ok", "decode", f"{decodes} tasks at once on {len(on)} nodes{labelled}")
        yield from _check_gpu_nodes(options, nodes)
        yield from _check_store(options, image_size, nodes, on, decodes)


def _rooms(nodes: Sequence[Node]) -> list[Room]:
    return [Room(node.cpus, node.gpus) for node in nodes]


def _fit(
    subject: str,
    setting: str,
    wanted: int,
    placed: int,
    cpus: float,
    gpus: float,
    scaled: dict[str, float],
) -> Finding:
    each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    if placed == wanted:
        return Finding("ok", subject, f"{setting}, each {each}: fit")
    lacks = "GPU nodes" if gpus else "CPU nodes"
    text = f"{setting}, each {each}: {placed} fit on the nodes that are up."
    most = scaled.get("GPU" if gpus else "CPU", 0.0)
    if most >= wanted * (gpus or cpus):
        return Finding("warning", subject, f"{text} {_may_start(lacks, most)}")
    return Finding(
        "problem",
        subject,
        f"{text} The rest would wait for ever: {lacks} are missing. Add some, or set "
        f"{setting.partition('=')[0]}={max(placed, 1)}.",
    )


def _may_start(lacks: str, most: float) -> str:
    unknown = ", if its limits allow it: Ray does not tell them" * math.isinf(most)
    return f"The autoscaler may start the missing {lacks}{unknown}."


def _check_gpu_nodes(options: PrecomputeSection, nodes: Sequence[Node]) -> Iterator[Finding]:
    mixed = {node.gpus > 0 for node in nodes if node.cpus} == {True, False}
    if options.gpus_per_actor and not options.decode_labels and mixed:
        yield Finding(
            "warning",
            "decode",
            "decode tasks may also run on GPU nodes, whose CPUs the actors need. Label the CPU "
            "nodes (ray start --labels fae-nodes=cpu) and set "
            "precompute.decode_labels.fae-nodes=cpu.",
        )


def _check_store(
    options: PrecomputeSection,
    image_size: int,
    nodes: Sequence[Node],
    decoding: Sequence[Node],
    decodes: int,
) -> Iterator[Finding]:
    shard = options.shard_size * image_size**2 * 3
    flying = decodes + QUEUED_PER_ACTOR * options.num_actors
    store = sum(node.store for node in nodes)
    smallest = min(node.store for node in decoding)
    text = (
        f"a shard is {size_text(shard)} (shard_size × image_size² × 3), up to {flying} at once "
        f"are {size_text(flying * shard)}"
    )
    if shard > smallest:
        yield Finding(
            "problem",
            "object store",
            f"{text}; the smallest node's store has {size_text(smallest)}. "
            "Lower precompute.shard_size.",
        )
    elif flying * shard > STORE_SHARE * store:
        yield Finding(
            "warning",
            "object store",
            f"{text}; the stores have {size_text(store)}. Ray will pause decoding or spill to "
            "disk. Lower precompute.shard_size, raise cpus_per_decode, or give the nodes larger "
            "object stores.",
        )
    else:
        yield Finding("ok", "object store", f"{text} of {size_text(store)}")
