"""Calls spread over a Ray cluster: a `map` by tasks, and several streams of results as one.

They do what a job's driver cannot do alone on a large cluster: read a million footers, drive a
thousand actors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from .session import plain_error, prepare_data, quiet_logs

T = TypeVar("T")


def fan_out(function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """`map` by Ray tasks, the results in order; one or two items are done here.

    Raises what `function` raises.
    """
    import ray

    arguments = list(items)
    if len(arguments) <= 2:
        yield from map(function, arguments)
        return
    task = ray.remote(num_cpus=0.5)(function)
    waiting = deque(task.remote(argument) for argument in arguments)
    try:
        while waiting:
            yield ray.get(waiting.popleft())
    except Exception as error:
        raise plain_error(error) from None


def smallest_node_cpus() -> int:
    """Whole CPUs of the node that has the fewest, of those that have any; 0 where none has."""
    import ray

    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((count for count in cpus if count), default=0)


def in_lanes(
    stream: Callable[..., Iterator[T]], arguments: Iterable[tuple[Any, ...]]
) -> Iterator[T]:
    """The items of `stream(*some)` for each of `arguments`, a process each, as they come.

    The processes run on this node and hold none of its CPUs: the loss of another node does not end
    them, and they are busy no more than a driver is.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lane: Any = ray.remote(_gathered).options(
        num_cpus=0, max_retries=0, num_returns="streaming", scheduling_strategy=here
    )
    running: list[Any] = [lane.remote(stream, some) for some in arguments]
    try:
        while running:
            ready: Any = ray.wait(running, num_returns=1)[0][0]
            try:
                items = ray.get(next(ready))
            except StopIteration:
                running.remove(ready)
                continue
            yield from items
    finally:
        for unfinished in running:
            ray.cancel(unfinished)


def _gathered(stream: Callable[..., Iterator[T]], some: tuple[Any, ...]) -> Iterator[list[T]]:
    """The items of a second at a time: few messages, however many items."""
    quiet_logs()
    prepare_data()
    items, sent = [], time.monotonic()
    for item in stream(*some):
        items.append(item)
        if time.monotonic() - sent > 1.0:
            yield items
            items, sent = [], time.monotonic()
    yield items
