"""Images for training: those of each step, and those held out, decoded by Ray Data on CPUs.

The trainers of autoencoder and pixel decoder read their images here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config.sections import DataSection, TrainingSection
from ..data import EpochOrder
from ..data.decoding import WINDOW_BATCHES, decoded
from ..data.records import ImageRecord
from .batches import Batch, blank_batch, to_device
from .job import Feed, parts_of

HELD_OUT_BATCH = 32


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch before it is decoded.

    `items` are numbers of training images, `samples` their places in the global batch; `weight` is
    that of their part.
    """

    step: int
    items: list[int]
    samples: list[int]
    weight: float


def step_parts(
    order: EpochOrder, training: TrainingSection, step: int, rank: int, world_size: int
) -> list[PlannedBatch]:
    """The micro-batches of worker `rank` at `step`."""
    parts = parts_of(training, rank, world_size)
    items = [order.batch(step, training.batch_size, part.places)[0].tolist() for part in parts]
    return [
        PlannedBatch(step, numbers, list(part.places), part.weight)
        for numbers, part in zip(items, parts, strict=True)
    ]


def image_feed(
    records: Sequence[ImageRecord],
    data: DataSection,
    size: int,
    seed: int,
    training: TrainingSection,
) -> Feed:
    """The feed of a job on images: `batch["images"]` uint8 [n, size, size, 3], by EpochOrder."""
    order = EpochOrder(len(records), seed)

    def windows(start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        per_step = len(parts_of(training, rank, world_size))
        steps_per_window = max(1, WINDOW_BATCHES // per_step)
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


def blank_images(num: int, size: int) -> Batch:
    """A batch such as `image_feed` makes, of `num` black images."""
    return blank_batch({"images": torch.zeros(num, size, size, 3, dtype=torch.uint8)})


def image_batches(
    records: Sequence[ImageRecord], data: DataSection, size: int
) -> Iterator[np.ndarray]:
    """The images uint8 [n, size, size, 3] of `records`, up to 32 at a time, without bad ones."""
    starts = range(0, len(records), HELD_OUT_BATCH)
    for images, kept, _ in decoded([records[i : i + HELD_OUT_BATCH] for i in starts], data, size):
        if kept:
            yield np.array(images)


def _batch(
    part: PlannedBatch,
    planned: Sequence[ImageRecord],
    images: np.ndarray,
    kept: list[int],
    errors: list[dict[str, str]],
) -> Batch:
    keys = [planned[index].key for index in kept]
    samples = [part.samples[index] for index in kept]
    weight = part.weight * len(kept) / len(planned)
    if not kept:  # weight 0: a worker without images still takes part in averaging gradients
        images, samples = np.zeros((1, *images.shape[1:]), np.uint8), part.samples[:1]
    tensors = {"images": torch.from_numpy(np.array(images))}
    return Batch(part.step, tensors, samples, keys, weight, errors)
