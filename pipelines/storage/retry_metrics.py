"""The Prometheus counter of retried S3 requests; every process connected to Ray keeps it."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

NAME = "fae_s3_retries"
DESCRIPTION = "Retries of requests to S3"
LABELS = ("operation", "cause")


def count_retry(operation: str, cause: str) -> None:
    """Count one retry of an S3 request; does nothing in a process not connected to Ray."""
    # Reading S3 works without Ray, so this does not import it.
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        _counter().inc(tags={"operation": operation, "cause": cause})


@cache
def _counter() -> Any:
    from ray.util.metrics import Counter

    return Counter(NAME, DESCRIPTION, tag_keys=LABELS)
