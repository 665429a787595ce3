"""The pool of actors of a job: how many, and what Ray reserves for each.

runtime/actor_pool.py runs every such job; these sections are its settings.
"""

from __future__ import annotations

from pydantic import Field

from .base import Execution, Section


class ActorPoolSection(Section):
    """A pool of actors, each with the networks on one accelerator or on CPUs."""

    num_actors: Execution[int] = Field(1, gt=0)
    """Actors that work at once, each with its own copy of the networks."""
    gpus_per_actor: Execution[float] = Field(0.0, ge=0.0)
    """GPUs that Ray reserves for an actor; 0 computes on the CPU, and a fraction lets actors share
    a GPU."""
    cpus_per_actor: Execution[float] = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for an actor."""


class DecodingPoolSection(ActorPoolSection):
    """A pool of actors whose images are decoded by tasks on CPUs."""

    cpus_per_decode: Execution[float] = Field(0.5, gt=0.0)
    """CPUs that Ray reserves for a task that reads and decodes images."""
    decode_labels: Execution[dict[str, str]] = {}
    """Labels of the nodes that decode, like {fae-nodes: cpu}, so that GPU nodes do not; any node
    without them."""
    max_error_rate: Execution[float] = Field(0.01, ge=0.0, le=1.0)
    """A larger share of images that cannot be read, decoded or encoded ends the job."""
