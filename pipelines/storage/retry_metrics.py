"""The Prometheus counter of S3 requests that are tried again, kept by every process that is connected to Ray."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

NAME = "fae_s3_retries"
DESCRIPTION = "Requests to S3 that were tried again"
LABELS = ("operation", "cause")


def count_retry(operation: str, cause: str) -> None:
    """Count one request to S3 that is tried again; nothing in a process that is not connected to Ray."""
    # Reading S3 needs no Ray, and must not import it for this.
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        _counter().inc(tags={"operation": operation, "cause": cause})


@cache
def _counter() -> Any:
    from ray.util.metrics import Counter

    return Counter(NAME, DESCRIPTION, tag_keys=LABELS)
