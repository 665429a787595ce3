"""What is known of a job from its folder: counts, rates, time left, losses.

Nobody is asked whether a process lives: a folder shows only what was written there, and when. So a
job that has written nothing for long is `silent`, not dead.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fae_core.errors import UserError

FINISHED, RUNNING, SILENT, BEGUN = "finished", "running", "silent", "begun"
"""States: its last file is there; it wrote lately; it has not; it wrote no result yet."""
PATIENCE_SECONDS = 60.0
"""A job that writes often is silent after this time at the earliest."""
PATIENCE_WRITES = 5
"""A job is silent after so many times the usual pause between two writes."""


class StatusError(UserError, ValueError):
    """A folder that is none of a job's; the message says what was looked for."""


@dataclass(frozen=True)
class Status:
    """What a job's folder says. None where it cannot be known from there."""

    kind: str
    """What the folder is, in words."""
    uri: str
    state: str
    unit: str = ""
    """What `done` and `total` count: steps, shards, stages, trials."""
    done: int = 0
    total: int | None = None
    rate: float | None = None
    """`unit` per second."""
    seconds_left: float | None = None
    silent_seconds: float | None = None
    """Since the last write into the folder, by the clock of this machine."""
    errors: int = 0
    """Images that could not be read or encoded; failed trials of a sweep."""
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) of the loss terms of a training, and of its validations."""
    notes: Sequence[str] = ()
    parts: Sequence[Status] = ()
    """The jobs that this one consists of."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)


def time_left(done: int, total: int | None, rate: float | None) -> float | None:
    """Seconds until `total` at `rate`, None where one of both is unknown."""
    return (total - done) / rate if total is not None and rate else None


def silence(written: Sequence[float]) -> float | None:
    """Seconds since the last of the times `written` [seconds since 1970], None without any."""
    return max(0.0, time.time() - max(written)) if written else None


def live_state(silent_seconds: float | None, usual_pause: float | None) -> str:
    """RUNNING or SILENT by the last write; BEGUN where nothing says."""
    if silent_seconds is None:
        return BEGUN
    limit = max(PATIENCE_SECONDS, PATIENCE_WRITES * (usual_pause or 0.0))
    return RUNNING if silent_seconds <= limit else SILENT


def recent_rate(written: Sequence[float]) -> tuple[float | None, float | None]:
    """(writes per second, usual pause in seconds) of the newest session, from times of writes.

    A session ends where a pause is far longer than is usual, so the time between a kill and the
    next start is not counted. None with fewer than two writes.
    """
    times = sorted(written)[-256:]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    if not pauses:
        return None, None
    usual = statistics.median(pauses)
    limit = max(PATIENCE_SECONDS, 20 * usual)
    recent: list[float] = []
    for pause in reversed(pauses):
        if pause > limit:
            break
        recent.append(pause)
    total = sum(recent)
    return (len(recent) / total if total > 0 else None), usual
