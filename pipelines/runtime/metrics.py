"""What precompute counts while it runs, as Prometheus metrics of each Ray worker.

cluster/grafana-dashboard.json draws them. One record a shard and stage, so the cost does not grow
with images. Ray adds `ray_` before a name and `_total` after a counter's, and the labels of node
and worker. `fae_stage_seconds` of stage `encode` is the time that an actor's device works: its rate
is the busy share. Its count for `decode` less `fae_shards` is the number of shards that were done
again. Retries of S3 are counted by storage/retry_metrics.py.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fae_images": ("counter", "Images whose latents are stored", ()),
    "fae_shards": ("counter", "Shards stored", ()),
    "fae_image_errors": ("counter", "Images that were not read, decoded or encoded", ("stage",)),
    "fae_bytes": ("counter", "Encoded bytes read and bytes of latents written", ("direction",)),
    "fae_stage_seconds": ("histogram", "Seconds of one shard in a stage", ("stage",)),
}  # fmt: skip
"""Kind, description and labels of every metric."""
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Time one shard in the stage `name`: read, decode, encode or write."""
    started = time.perf_counter()
    yield
    _metric("fae_stage_seconds").observe(time.perf_counter() - started, tags={"stage": name})


def count_bytes(direction: str, number: int) -> None:
    """Add `number` bytes, `read` or `written`."""
    if number:
        _metric("fae_bytes").inc(number, tags={"direction": direction})


def count_shard(rows: int, errors: Sequence[dict[str, str]]) -> None:
    """One stored shard of `rows` latents, with the images that could not be encoded."""
    _metric("fae_shards").inc()
    if rows:
        _metric("fae_images").inc(rows)
    for cause, number in Tally(error["stage"] for error in errors).items():
        _metric("fae_image_errors").inc(number, tags={"stage": cause})


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, description, labels = METRICS[name]
    if kind == "histogram":
        return metrics.Histogram(name, description, boundaries=SECONDS, tag_keys=labels)
    return metrics.Counter(name, description, tag_keys=labels)
