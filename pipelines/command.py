"""What every job does around its work: read RECIPE key=value, and end a user's error with its message and status 2.

`fae` and each `python -m pipelines.JOB`, which is what a cluster's job runs, go through here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fae_core.errors import UserError
from pipelines.config import Recipe, load_recipe
from pipelines.secrets import redact


def guarded(action: Callable[[], Any]) -> int:
    """Run `action`; the exit status: 0, or 2 after the message of a UserError."""
    try:
        action()
    except UserError as error:
        print(f"fae: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfae: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def run_module(
    module: str, job: Callable[[Recipe], Any], arguments: Sequence[str] | None = None
) -> int:
    """`python -m MODULE RECIPE key=value ...`: run `job`, print what it returns as JSON; the exit status."""
    values = list(sys.argv[1:] if arguments is None else arguments)
    if not values or "=" in values[0]:
        print(f"usage: python -m {module} RECIPE [key=value ...]", file=sys.stderr)
        return 2
    return guarded(lambda: print(json.dumps(job(load_recipe(values[0], values[1:])), indent=1)))
