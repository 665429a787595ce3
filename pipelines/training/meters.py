"""What the loop measures while it trains: losses, speed, waiting time, undecodable images."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..storage import paths


class Meter:
    """Mean loss terms, images per second and the share of time spent waiting for data.

    Each since the last `flush`; `batch_size` is the number of images of a step over all workers.
    """

    def __init__(self, batch_size: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.world_size = world_size
        self.waited = self.elapsed = 0.0
        self.steps = 0
        self.totals: dict[str, Tensor] = {}
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count a step with these 0-dim loss terms; nothing waits for their values."""
        self.steps += 1
        now = time.perf_counter()
        self.elapsed, self.start = self.elapsed + now - self.start, now
        for name, value in terms.items():
            self.totals[name] = self.totals.get(name, torch.zeros((), device=value.device)) + value

    def restart(self) -> None:
        """Leave what happened since the last step (validation, checkpoint) out of the speed."""
        self.start = time.perf_counter()

    def flush(self) -> dict[str, float]:
        """The metrics since the last call; the terms are means over all workers, which all call."""
        means = torch.stack([total.float() for total in self.totals.values()]) / self.steps
        if self.world_size > 1:
            torch.distributed.all_reduce(means)
            means /= self.world_size
        metrics = dict(zip(self.totals, means.tolist(), strict=True))
        metrics["images_per_second"] = self.batch_size * self.steps / self.elapsed
        metrics["data_wait_share"] = self.waited / self.elapsed
        self.waited = self.elapsed = 0.0
        self.steps, self.totals = 0, {}
        return metrics


class BadImages:
    """The images that this worker could not decode: one JSON line each in the run's folder."""

    def __init__(self, run_uri: str, rank: int, world_size: int) -> None:
        self.world_size = world_size
        self.uri = paths.join(run_uri, f"bad_images-{rank:05d}.jsonl")
        # Bytes are split at line ends alone, str also at U+2028, which a key may hold.
        lines = paths.read_bytes(self.uri).splitlines() if paths.exists(self.uri) else []
        self.found = {error["key"]: error for error in map(json.loads, lines)}
        self.saved = len(self.found)

    def count(self) -> int:
        """How many all workers have found, each image once; all of them call."""
        if self.world_size == 1:
            return len(self.found)
        keys: list[list[str]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(keys, list(self.found))
        return len(set().union(*keys))

    def add(self, errors: list[dict[str, str]]) -> None:
        """Keep the errors of keys that have none yet."""
        for error in errors:
            self.found.setdefault(error["key"], error)

    def save(self) -> None:
        """Write the file whole where there are new errors."""
        if len(self.found) > self.saved:
            lines = [json.dumps(self.found[key], ensure_ascii=False) for key in sorted(self.found)]
            paths.write_bytes(self.uri, ("\n".join(lines) + "\n").encode())
            self.saved = len(self.found)
