"""Batches of records to crops by Ray Data tasks on CPUs, in the order in which they are given.

The training feeds and the validation of the trainers read their images here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..config.sections import DataSection
from ..runtime.packages import refuse_this_node, versions
from .reading import load_crops
from .records import ImageRecord

DECODE_CPUS = 0.5
"""CPUs that Ray reserves for one decoding task of a training."""
WINDOW_BATCHES = 256
"""Batches of one Ray data set: what is decoded ahead waits in the object store."""


def decoded(
    parts: Sequence[Sequence[ImageRecord]], data: DataSection, size: int
) -> Iterator[tuple[np.ndarray, list[int], list[dict[str, str]]]]:
    """For each list of records (crops uint8 [n, size, size, 3], kept places, errors), in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    decode = DecodeBatch(data, size)
    for start in range(0, len(parts), WINDOW_BATCHES):
        window = parts[start : start + WINDOW_BATCHES]
        rows = [{"records": json.dumps([[r.key, r.uri] for r in records])} for records in window]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        # One row a block, so that any idle CPU takes the next micro-batch.
        for row in dataset.map(decode, num_cpus=DECODE_CPUS).iter_rows():
            notes = json.loads(row["notes"])
            kept = notes["kept"]
            yield np.asarray(row["images"])[: len(kept)], kept, notes["errors"]


class DecodeBatch:
    """Ray Data's map function: a row with the records of a micro-batch to one with its crops."""

    def __init__(self, data: DataSection, size: int) -> None:
        self.data = data
        self.size = size
        self.versions = versions()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        refuse_this_node(self.versions)
        records = [ImageRecord(key, uri) for key, uri in json.loads(row["records"])]
        images, kept, errors = load_crops(records, self.size, self.data)
        if not kept:  # a tensor of no images has no place in a block
            images = np.zeros((1, self.size, self.size, 3), np.uint8)
        notes = json.dumps({"kept": [int(index) for index in kept], "errors": errors})
        return {"images": images, "notes": notes}
