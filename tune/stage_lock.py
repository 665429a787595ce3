"""A lock that lets one trial at a time run a stage: a named actor of Ray.

Ray's control service gives a name to one actor only, so a lock has one owner. The actor dies with
the process that made it: a trial that is stopped or killed holds no lock, and the next trial
resumes the stage from its checkpoints. This module imports nothing heavy, because every lock is a
process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError

from fae.pipelines.runtime.lanes import on_this_node

NAMESPACE = "fae-stages"


class _Lock:
    """An actor that lives while its owner runs the stage."""

    async def ready(self) -> None:
        """Return once the actor runs, which means that the lock is taken."""

    async def released(self) -> None:
        """Never return; the caller learns of the release from the actor's death."""
        await asyncio.Event().wait()


@contextlib.contextmanager
def stage_lock(name: str) -> Iterator[None]:
    """Hold the cluster's lock `name`; wait first while another process holds it."""
    lock = _try_lock(name)
    while lock is None:
        with contextlib.suppress(RayActorError, ValueError):
            ray.get(ray.get_actor(name, NAMESPACE).released.remote())
        lock = _try_lock(name)
    try:
        yield
    finally:
        ray.kill(lock)


def _try_lock(name: str) -> Any:
    """The handle of the taken lock, None where another process holds it."""
    options: Any = {"name": name, "namespace": NAMESPACE, "max_concurrency": 1000}
    try:
        # On another node the lock could be lost while its owner goes on.
        lock: Any = ray.remote(_Lock).options(**options, **on_this_node()).remote()
    except ValueError:  # what Ray raises for a name that is taken
        return None
    ray.get(lock.ready.remote())
    return lock
