"""Notice of a node that will be taken away: a training saves its state and resumes elsewhere.

Ray Train hears of it by a drain of the node: its own on SIGTERM, an autoscaler's, or `ray
drain-node`. The loop asks after its steps; launch.py starts the workers again.
"""

from __future__ import annotations

import time

ASK_SECONDS = 1.0
"""Between two questions, each of which takes milliseconds; Ray Train itself looks every 5 s."""


class NodeLeaving(RuntimeError):
    """A node of the workers will be taken away, and a checkpoint of this step is written."""


class Notice:
    """Asks about once a second, and all workers after the same steps: a question is collective."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._steps = self._wait = 1

    def after_step(self) -> bool:
        """Whether a node of the workers will be taken away soon; all workers call it each step."""
        self._wait -= 1
        if self._wait > 0:
            return False
        found = node_leaves()
        now = time.monotonic()
        pace = max((now - self._asked) / self._steps, 1e-3)
        self._asked, self._steps = now, same_for_all(max(1, int(ASK_SECONDS / pace)))
        self._wait = self._steps
        return found


def node_leaves() -> bool:
    """Whether a node of the workers will be taken away soon; all of them must ask together."""
    import ray.train

    ask = getattr(ray.train, "get_preemption_info", None)  # alpha, and not in Ray 2.56
    return ask is not None and ask() is not None


def same_for_all(value: int) -> int:
    """The first worker's `value`; all workers must call it together."""
    from ray.train.collective import broadcast_from_rank_zero

    found: int = broadcast_from_rank_zero(value)
    return found
