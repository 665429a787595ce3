"""Ray: the session, calls and actor pools spread over it, progress, metrics. Imports no torch."""

from . import metrics as metrics
from . import session as session
from .lanes import fan_out as fan_out
from .lanes import in_lanes as in_lanes
from .lanes import smallest_node_cpus as smallest_node_cpus
from .packages import versions as versions
from .progress import Progress as Progress

__all__ = [
    "Progress",
    "fan_out",
    "in_lanes",
    "metrics",
    "session",
    "smallest_node_cpus",
    "versions",
]
