"""What the folders of a sweep's trials record, read without their stages and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fae.pipelines.storage import paths

from .spaces import Settings

FINISHED, STOPPED = "finished", "stopped early"
"""States of a trial that has ended: all stages ran, or the scheduler stopped it."""
UNFINISHED, FAILED = "unfinished", "failed"
"""States of a trial that the same command continues: it runs or was interrupted, or a stage
failed.
"""


@dataclass(frozen=True)
class RecordedTrial:
    """A trial as its folder records it; `metrics` are named STAGE/NAME."""

    key: str
    state: str
    settings: Settings
    metrics: Mapping[str, float]
    latent_dim: int


def recorded(folder: str) -> dict[str, dict[str, Any]]:
    """Every trial of the sweep by key: its result, its failure, or its settings as `UNFINISHED`."""
    found: dict[str, dict[str, Any]] = {}
    ended = ("result.json", "failure.json")
    for file in paths.list_files(paths.join(folder, "trials")):
        *_, key, name = file.uri.split("/")
        if name in ended and found.get(key, {}).get("state") not in (FINISHED, STOPPED):
            found[key] = json.loads(paths.read_bytes(file.uri))
        elif name == "settings.json" and key not in found:
            settings = json.loads(paths.read_bytes(file.uri))
            found[key] = {"state": UNFINISHED, "settings": settings, "metrics": {}}
    return dict(sorted(found.items()))
