"""Processor seconds of this process and of what it has started, by what each of them does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import psutil

RAY_PROCESSES = {"gcs_server": "directory", "raylet": "raylet"}
"""What Ray's programs are called here, by their names."""


def seconds_by(
    kind_of_worker: Callable[[str], str], more: Iterable[psutil.Process] = ()
) -> Counter[str]:
    """Processor seconds so far by kind: driver (this process), directory, raylet, dashboard, other,
    and what `kind_of_worker` makes of a worker's title, such as `ray::IDLE`.

    `more` are parents of further processes. Time of processes that have ended is not in it.
    """
    me = psutil.Process()
    parents = list(more)
    started = [child for parent in (me, *parents) for child in parent.children(recursive=True)]
    used: Counter[str] = Counter()
    for process in {*started, *parents, me}:
        try:
            times, name, title = process.cpu_times(), process.name(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        if process == me:
            kind = "driver"
        elif name in RAY_PROCESSES:  # the raylet's command line names the dashboard too
            kind = RAY_PROCESSES[name]
        elif title.startswith("ray::"):
            kind = kind_of_worker(title)
        elif "/dashboard/" in title or title.startswith("ray-dashboard"):
            kind = "dashboard"
        else:
            kind = "other"
        used[kind] += times.user + times.system
    return used
