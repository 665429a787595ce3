"""One trial at a time runs a stage: the claim is a named actor of Ray, which dies with the process that made it.

So a claim has one owner, whom Ray's control service names in a race, and a trial that is stopped or killed holds nothing:
the next one goes on from its checkpoints. Imports nothing heavy: each claim is a process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError

NAMESPACE = "fae-stages"


class _Claim:
    """Lives while its owner runs the stage."""

    async def ready(self) -> None:
        """Returns once the claim stands."""

    async def ended(self) -> None:
        """Never returns; its caller hears of the claim's end by the actor's death."""
        await asyncio.Event().wait()


@contextlib.contextmanager
def stage_lock(name: str) -> Iterator[None]:
    """Hold the claim `name` of this cluster; waits while another process holds it."""
    claim = _take(name)
    while claim is None:
        with contextlib.suppress(RayActorError, ValueError):
            ray.get(ray.get_actor(name, NAMESPACE).ended.remote())
        claim = _take(name)
    try:
        yield
    finally:
        ray.kill(claim)


def _take(name: str) -> Any:
    """The claim's handle, None where another process holds it."""
    options: Any = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 1000}
    try:
        claim: Any = ray.remote(_Claim).options(**options).remote()
    except ValueError:  # what Ray raises for a name that is taken
        return None
    ray.get(claim.ready.remote())
    return claim
