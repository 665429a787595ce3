"""Images for training: which of them make a step, and Ray Data tasks that decode them on CPUs in that order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.batches import Batch, to_device
from pipelines.config import DataSection, TrainingSection
from pipelines.cpu_tasks import DecodeBatch
from pipelines.epoch_order import EpochOrder
from pipelines.sources import ImageRecord
from pipelines.training import DECODE_CPUS, Feed, TrainingError

WINDOW_BATCHES = 256


@dataclass(frozen=True)
class Part:
    """One planned micro-batch: item numbers of the training images and their places in the global batch."""

    step: int
    items: list[int]
    samples: list[int]


def step_parts(
    order: EpochOrder, training: TrainingSection, step: int, rank: int, world_size: int
) -> list[Part]:
    """The micro-batches of worker `rank` at `step`: an equal slice of the global batch for each (micro, rank)."""
    slices = world_size * training.accumulation
    if training.batch_size % slices:
        raise TrainingError(
            f"training.batch_size={training.batch_size} is not divisible by num_workers x accumulation = "
            f"{world_size} x {training.accumulation}."
        )
    size = training.batch_size // slices
    items, _ = order.batch(step, training.batch_size, 0, 1)
    starts = [(micro * world_size + rank) * size for micro in range(training.accumulation)]
    return [
        Part(
            step,
            [int(item) for item in items[start : start + size]],
            list(range(start, start + size)),
        )
        for start in starts
    ]


def decoded(
    parts: Sequence[Sequence[ImageRecord]], data: DataSection, size: int
) -> Iterator[tuple[np.ndarray, list[int], list[dict[str, str]]]]:
    """For each list of records: (crops uint8, kept places, errors), decoded by Ray Data on CPUs, in this order."""
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


def image_feed(
    records: Sequence[ImageRecord],
    data: DataSection,
    size: int,
    seed: int,
    training: TrainingSection,
) -> Feed:
    """The feed of a job that trains on images: `batch["images"]` uint8 [n, size, size, 3], in EpochOrder's order."""
    order = EpochOrder(len(records), seed)

    def windows(start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        steps_per_window = max(1, WINDOW_BATCHES // training.accumulation)
        for first in range(start_step, training.steps, steps_per_window):
            steps = range(first, min(first + steps_per_window, training.steps))
            parts = [
                part
                for step in steps
                for part in step_parts(order, training, step, rank, world_size)
            ]
            wanted = [[records[item] for item in part.items] for part in parts]
            made = decoded(wanted, data, size)
            for part, planned, (images, kept, errors) in zip(parts, wanted, made, strict=True):
                yield _batch(part, planned, images, kept, errors)

    def feed(start_step: int, rank: int, world_size: int, device: torch.device) -> Iterator[Batch]:
        return to_device(windows(start_step, rank, world_size), device)

    return feed


def _batch(
    part: Part,
    planned: Sequence[ImageRecord],
    images: np.ndarray,
    kept: list[int],
    errors: list[dict[str, str]],
) -> Batch:
    keys = [planned[index].key for index in kept]
    samples = [part.samples[index] for index in kept]
    weight = len(kept) / len(planned)
    if not kept:  # weight 0: a worker without images still takes part in averaging gradients
        images, samples = np.zeros((1, *images.shape[1:]), np.uint8), part.samples[:1]
    tensors = {"images": torch.from_numpy(np.array(images))}
    return Batch(part.step, tensors, samples, keys, weight, errors)
