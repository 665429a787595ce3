"""What a training step consumes: micro-batches with their random numbers, made ahead by a thread.

Noise and flips are functions of (seed, stream, step, place in the global batch). Rank,
accumulation, interruptions and earlier draws therefore cannot change them. The feeds make batches,
the losses draw.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fae_core.draws import normal_draws, uniform_draws

PREFETCH_BATCHES = 4
"""Micro-batches that wait for the step."""
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one worker; `batch["images"]` is a tensor of it, with first dimension n.

    `samples` are its places in the global batch of `step`, which seed their randomness; `keys` name
    them to people. `weight` is n over the mean size of the step's micro-batches, less where images
    could not be decoded; `errors` are those images.
    """

    step: int
    tensors: dict[str, Tensor]
    samples: list[int]
    keys: list[str]
    weight: float
    errors: list[dict[str, str]]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`; from pinned memory the copy does not wait."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, tensors={name: t.pin_memory() for name, t in self.tensors.items()})


def blank_batch(tensors: dict[str, Tensor]) -> Batch:
    """A batch of `tensors` at step 0, for what depends on shapes alone."""
    size = len(next(iter(tensors.values())))
    return Batch(0, tensors, list(range(size)), [""] * size, 1.0, [])


def sample_noise(seed: int, stream: str, batch: Batch, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [n, *shape] float32, drawn where the batch is.

    A pixel decoder's step of 128 images takes 50 million numbers (256 tokens of 1,536): too many
    for a CPU to draw while a GPU waits.
    """
    return normal_draws(seed, stream, batch.step, batch.samples, shape, batch.device)


def images_and_features(
    seed: int, batch: Batch, flip: bool, backbone: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Images [n, S, S, 3], half of them mirrored where `flip`, and their features [n, N, D].

    A batch from a feature cache has both.
    """
    if "features" in batch.tensors:
        return batch["images"], batch["features"]
    images = random_flips(seed, batch) if flip else batch["images"]
    return images, backbone(images)


def random_flips(seed: int, batch: Batch) -> Tensor:
    """The batch's images [n, S, S, 3], half of them mirrored left to right."""
    draws = uniform_draws(seed, "flip", batch.step, batch.samples, device=batch.device)
    images = batch["images"]
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(2), images)


def prefetched(items: Iterator[T], depth: int = PREFETCH_BATCHES) -> Iterator[T]:
    """The same items, made `depth` ahead by a thread; its exception is raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(message: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(message, timeout=0.2)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer(("item", item)):
                    return
            offer(("end", None))
        except BaseException as error:
            offer(("error", error))

    threading.Thread(target=produce, name="feed", daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, made ahead by a thread; on a GPU through pinned memory."""
    if device.type == "cuda":
        batches = (batch.pinned() for batch in batches)
    for batch in prefetched(batches):
        yield batch.to(device)
