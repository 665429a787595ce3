"""Ray: the session, calls and actor pools spread over it, progress, metrics. Imports no torch."""

from . import actor_pool as actor_pool
from . import lanes as lanes
from . import metrics as metrics
from . import packages as packages
from . import places as places
from . import progress as progress
from . import ray_private as ray_private
from . import session as session

__all__ = [
    "actor_pool",
    "lanes",
    "metrics",
    "packages",
    "places",
    "progress",
    "ray_private",
    "session",
]
