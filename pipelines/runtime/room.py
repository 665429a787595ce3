"""Whether a job's actors leave CPUs for decoding, and what a job says while it gets no rows.

Ray starts actors first and lets everything else wait, without a word. actor_pool.py asks here.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from fae_core.errors import UserError

from ..config.sections import ActorPoolSection, DecodingPoolSection
from . import ray_private
from .lanes import Room, place
from .session import on_cluster

SILENT_SECONDS = 120.0
"""Without a row, before the first line says so; the next follow after twice the time each."""


class NoRoom(UserError, RuntimeError):
    """The actors take every CPU, so that no task could prepare a row for them."""


class Stalled(UserError, TimeoutError):
    """No row moved for so long that the job was given up."""


def check_room(pool: ActorPoolSection) -> None:
    """Raises NoRoom where the actors of this machine's own Ray would leave no CPU for decoding.

    On a cluster it says so on standard error instead, because a node may join. Where an autoscaler
    or `decode_labels` may bring or choose other nodes, only `fae doctor` can tell.
    """
    if not isinstance(pool, DecodingPoolSection) or pool.decode_labels:
        return
    rooms = _rooms()
    cpus = sum(room.cpus for room in rooms)
    placed, left = place(rooms, pool.num_actors, pool.cpus_per_actor, pool.gpus_per_actor)
    if not placed or any(room.cpus >= pool.cpus_per_decode for room in left):
        return
    if ray_private.most_after_scaling():
        return
    text = (
        f"num_actors={pool.num_actors} with cpus_per_actor={pool.cpus_per_actor:g} leave no "
        f"{pool.cpus_per_decode:g} of the {cpus:g} CPUs for a task that decodes "
        "(cpus_per_decode). Lower num_actors or cpus_per_actor: the actors would wait for images "
    )
    if not on_cluster():
        raise NoRoom(f"{text}for ever.")
    print(f"fae: {text}until a node joins.", file=sys.stderr, flush=True)


def _rooms() -> list[Room]:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Room(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]


class Waiting:
    """A context in which rows come: after minutes without one it says what the cluster has."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def came(self) -> None:
        """A row came."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        silent = SILENT_SECONDS
        while not self._ended.wait(min(SILENT_SECONDS, 10.0)):
            waited = time.monotonic() - self._last
            if waited < SILENT_SECONDS:
                silent = SILENT_SECONDS
            elif waited >= silent:
                silent = 2 * waited
                text = f"nothing was finished in the last {waited / 60:.0f} minutes; {cluster()}"
                print(f"fae: {text}", file=sys.stderr, flush=True)


def cluster() -> str:
    """What the connected cluster has, in words."""
    import ray

    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    there, free = ray.cluster_resources(), ray.available_resources()
    kinds = [
        f"{free.get(kind, 0.0):g} of {there[kind]:g} {kind}s free"
        for kind in ("CPU", "GPU")
        if there.get(kind)
    ]
    plural = "s are" if nodes != 1 else " is"
    return f"{nodes} node{plural} up, {' and '.join(kinds) or 'without a CPU'}."
