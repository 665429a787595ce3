"""Calls spread over a Ray cluster: a `map` by tasks, a call on each node, several streams as one.

They do what a job's driver cannot do alone on a large cluster: read a million footers, drive a
thousand actors.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from .session import plain_error, prepare_data, quiet_logs

T = TypeVar("T")

ANSWER_SECONDS = 60.0
"""How long all nodes together have to run one small task each."""


class Answer(NamedTuple):
    """What one node, as `ray.nodes()` describes it, returned or raised."""

    node: dict[str, Any]
    value: Any
    error: Exception | None

    @property
    def address(self) -> str:
        return str(self.node["NodeManagerAddress"])


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


def ask_every_node(
    function: Callable[..., Any], *arguments: Any, but: str | None = None
) -> Iterator[Answer]:
    """`function(*arguments)` on every alive node except the one with the id `but`.

    The task takes no CPU, and so runs beside whatever the node does. A node that does not answer
    within ANSWER_SECONDS has the error TimeoutError; one that Ray takes for dead by then is left
    out.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments): node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != but
    }
    if not asked:
        return
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for reference, node in asked.items():
        if node["NodeID"] not in alive:
            continue
        if reference not in answered:
            ray.cancel(reference, force=True)
            yield Answer(node, None, TimeoutError(f"no answer in {ANSWER_SECONDS:g} s"))
            continue
        try:
            yield Answer(node, ray.get(reference), None)
        except Exception as error:  # Whatever a task raises says something about its node.
            yield Answer(node, None, plain_error(error))


def this_node() -> str:
    """`node ADDRESS: ` of the node of this process; empty where the cluster has but one."""
    import ray

    if not ray.is_initialized():
        return ""
    here, nodes = ray.get_runtime_context().get_node_id(), ray.nodes()
    (address,) = (node["NodeManagerAddress"] for node in nodes if node["NodeID"] == here)
    return f"node {address}: " if len(nodes) > 1 else ""


def smallest_node_cpus() -> int:
    """Whole CPUs of the node that has the fewest, of those that have any; 0 where none has."""
    import ray

    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((count for count in cpus if count), default=0)


@dataclass(frozen=True)
class Room:
    """CPUs and GPUs of a node, or what is left of them."""

    cpus: float
    gpus: float = 0.0


def place(nodes: Sequence[Room], number: int, cpus: float, gpus: float) -> tuple[int, list[Room]]:
    """How many of `number` processes fit on the nodes, and what each node has left then."""
    placed, left = 0, []
    for node in nodes:
        needs = [(have, need) for have, need in ((node.cpus, cpus), (node.gpus, gpus)) if need]
        here = min([number - placed, *(math.floor(have / need) for have, need in needs)])
        left.append(Room(node.cpus - here * cpus, node.gpus - here * gpus))
        placed += here
    return placed, left


def in_lanes(
    stream: Callable[..., Iterator[T]], arguments: Iterable[tuple[Any, ...]]
) -> Iterator[T]:
    """The items of `stream(*some)` for each of `arguments`, a process each, as they come.

    The processes run on this node and hold none of its CPUs: the loss of another node does not end
    them, and they are busy no more than a driver is.
    """
    import ray

    # A process ends with its stream (max_calls), and Ray ends what it has started. The actors of a
    # stream that failed would else keep their GPUs for as long as Ray keeps the process.
    lane: Any = ray.remote(max_calls=1)(_gathered).options(
        max_retries=0, num_returns="streaming", **on_this_node()
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


def on_this_node() -> dict[str, Any]:
    """Options of a task or actor that runs on the node of this process and holds no CPU of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


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
