"""Ray: the session, calls and actor pools spread over it, progress, metrics. Imports no torch."""

from . import metrics as metrics
from . import progress as progress
from . import ray_private as ray_private
from . import session as session
from .actor_pool import RowStages as RowStages
from .actor_pool import run_rows as run_rows
from .lanes import fan_out as fan_out
from .packages import versions as versions

__all__ = [
    "RowStages",
    "fan_out",
    "metrics",
    "progress",
    "ray_private",
    "run_rows",
    "session",
    "versions",
]
