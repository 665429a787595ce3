"""What fills a planned store: the missing shards through Ray Data, errors counted, the commit.

`fae precompute` and `fae precompute-text` differ in what becomes of a shard, their `RowStages`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

from fae_core.errors import UserError

from ..config.sections import PrecomputeSection
from ..runtime.actor_pool import RowStages, run_rows
from ..runtime.lanes import fan_out
from ..runtime.progress import Progress
from .manifest import commit, missing_shards, read_manifest
from .plan import Plan
from .shards import THREADS, delete_shard, errors_by_shard, read_errors

SHOWN_ERRORS = 10
REPAIRABLE = ("read", "decode")
"""Stages of errors that another source may not have."""


class TooManyErrors(UserError, RuntimeError):
    """More images failed than `precompute.max_error_rate` allows; the text shows the first."""


def shards_to_run(plan: Plan, section: PrecomputeSection) -> list[int]:
    """The missing shards. Where an earlier run recorded more errors than are allowed now, the
    shards with images that could not be read or decoded are deleted first, and so are among them:
    the source may have been repaired.
    """
    missing = missing_shards(plan.uri, plan)
    if read_manifest(plan.uri, plan.format) is not None:
        return missing
    without = set(missing)
    num_errors, failed = 0, list[int]()
    for shard, errors in errors_by_shard(plan.uri):
        if shard not in without:
            num_errors += len(errors)
            failed += [shard] * any(error["stage"] in REPAIRABLE for error in errors)
    if num_errors <= section.max_error_rate * plan.num_images or not failed:
        return missing
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda shard: delete_shard(plan.uri, shard), failed))
    return sorted([*missing, *failed])


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
    raise TooManyErrors(
        f"{num_errors} of {plan.num_images} images could not be encoded, more than "
        f"precompute.max_error_rate={allowed:g} allows. Nothing was committed. Repair the source "
        "and run the same command again: it reads anew the shards with such images. Or raise the "
        f"rate: it goes on from the finished shards. The first:\n{first}"
    )
