"""Notice of a node that will be taken away: a training saves its state and resumes elsewhere.

Ray Train hears of it by a drain of the node: an autoscaler's, or `ray drain-node` in the node's own
stop hook. The loop asks after each step; launch.py starts the workers again.
"""

from __future__ import annotations


class NodeLeaving(RuntimeError):
    """A node of the workers will be taken away, and a checkpoint of this step is written."""


def node_leaves() -> bool:
    """Whether a node of the workers will be taken away soon; all of them must ask together."""
    import ray.train

    ask = getattr(ray.train, "get_preemption_info", None)  # alpha, and not in Ray 2.56
    return ask is not None and ask() is not None
