"""What fills a planned store: the missing shards through Ray Data, errors counted, the commit.

`fae precompute` and `fae precompute-text` differ in what becomes of a shard, their `RowStages`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

from fae_core.errors import UserError

from ..config.sections import PrecomputeSection
from ..runtime.actor_pool import RowStages, run_rows
from ..runtime.lanes import fan_out
from ..runtime.progress import Progress
from ..runtime.session import start_ray
from ..storage import paths
from .manifest import commit, missing_shards
from .plan import Plan
from .shards import THREADS, delete_shard, error_files, errors_by_shard, read_errors

SHOWN_ERRORS = 10
REPAIRABLE = ("read", "decode")
"""Stages of errors that another source may not have."""


class TooManyErrors(UserError, RuntimeError):
    """More images failed than `precompute.max_error_rate` allows; the text shows the first."""


def shards_to_run(
    plan: Plan, section: PrecomputeSection, is_readable: Callable[[int, list[str]], bool]
) -> list[int]:
    """The missing shards, among them those that a repaired source lets do anew.

    Where an earlier run recorded more errors than are allowed now, `is_readable(shard, keys)` tells
    on the cluster whether one of a shard's images that could not be read or decoded can be now.
    Such shards are deleted. Another driver may do the same, or finish the store meanwhile.
    """
    missing = missing_shards(plan.uri, plan)
    manifest_uri = paths.join(plan.uri, "manifest.json")
    if paths.exists(manifest_uri):
        return missing
    allowed, without = section.max_error_rate * plan.num_images, set(missing)
    files = {shard: file for shard, file in error_files(plan.uri).items() if shard not in without}
    if len(files) * plan.shard_size <= allowed:
        return missing
    num_errors, failed = 0, list[tuple[int, list[str]]]()
    for shard, errors in errors_by_shard(files):
        num_errors += len(errors)
        if keys := [error["key"] for error in errors if error["stage"] in REPAIRABLE]:
            failed.append((shard, keys))
    if num_errors <= allowed or not failed:
        return missing
    start_ray()
    readable = fan_out(lambda some: is_readable(*some), failed)
    repaired = [shard for (shard, _), now in zip(failed, readable, strict=True) if now]

    def deleted(shard: int) -> bool:
        return not paths.exists(manifest_uri) and delete_shard(plan.uri, shard, files[shard])

    with ThreadPoolExecutor(THREADS) as pool:
        num_anew = sum(pool.map(deleted, repaired))
    if num_anew:
        said = f"{num_anew} shards with images that are readable now are done anew"
        print(said, file=sys.stderr, flush=True)
    return missing_shards(plan.uri, plan) if repaired else missing


def fill_store(
    plan: Plan,
    units: Sequence[Sequence[int]],
    stages: RowStages,
    section: PrecomputeSection,
    started: float,
    show_progress: bool,
) -> dict[str, Any]:
    """Run the missing shards, which lie in `units` of work, and commit; returns the manifest.

    `started` is when the job began, by time.monotonic. Raises TooManyErrors.
    """
    rates = run_shards(plan, units, stages, section, show_progress) if units else {}
    each = fan_out if units else map
    errors = read_errors(plan.uri, each)
    first = list(islice(errors, SHOWN_ERRORS))
    _check_error_rate(section.max_error_rate, plan, len(first) + sum(1 for _ in errors), first)
    num_shards = sum(map(len, units))
    run = {"seconds": time.monotonic() - started, "shards_encoded": num_shards, **rates}
    return commit(plan.uri, plan, run, each)


def run_shards(
    plan: Plan,
    units: Sequence[Sequence[int]],
    stages: RowStages,
    section: PrecomputeSection,
    show_progress: bool,
) -> dict[str, float]:
    """Run the Ray data set over the shards of `units`; stops once too many images have failed.

    Returns `images_per_second` from start to end, and of eight shards or more
    `steady_images_per_second`: between the ends of encoding of the shards at a quarter and at three
    quarters, so neither start-up nor what was decoded ahead counts.
    """
    rows: list[dict[str, Any]] = [{"shard": shard} for (shard, *_) in units]
    if any(len(unit) > 1 for unit in units):
        rows = [{"shards": list(unit)} for unit in units]
    todo = sum(map(len, units))
    num_errors, first = 0, list[dict[str, str]]()
    with (
        Progress(todo, plan.num_images, show_progress, plan.num_shards - todo) as progress,
        closing(run_rows(rows, stages, section)) as finished,
    ):
        for row in finished:
            found = json.loads(str(row["errors"]))
            num_errors += len(found)
            first += found[: SHOWN_ERRORS - len(first)]
            progress.add(int(row["rows"]), len(found), float(row["encoded_at"]))
            _check_error_rate(section.max_error_rate, plan, num_errors, first)
        return progress.close()


def _check_error_rate(
    allowed: float, plan: Plan, num_errors: int, errors: list[dict[str, str]]
) -> None:
    if num_errors <= allowed * plan.num_images:
        return
    first = "\n".join(f"  {e['key']} [{e['stage']}] {e['message']}" for e in errors)
    how = "Raise the rate, and the same command goes on from the finished shards."
    if any(error["stage"] in REPAIRABLE for error in errors):
        how = (
            "Repair the source and run the same command again: it does anew the shards with such "
            "images that are readable then. Or raise the rate: it goes on from the finished shards."
        )
    raise TooManyErrors(
        f"{num_errors} of {plan.num_images} images could not be encoded, more than "
        f"precompute.max_error_rate={allowed:g} allows. Nothing was committed. {how} The first:\n"
        f"{first}"
    )
