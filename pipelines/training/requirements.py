"""What a training asks of the cluster: CPUs and GPUs, and the memory of its largest step.

`fae run` and `fae tune` ask whether trainings fit side by side; `fae train … --dry-run` prints
the memory (doctor/memory.py). The networks are built with shapes alone, so asking needs neither
their weights nor their memory. `--probe` times real steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from fae_core.attention import fused_attention
from fae_core.precision import settled_precision

from ..config import Recipe
from ..config.sections import TrainingSection
from ..data.decoding import DECODE_CPUS, WINDOW_BATCHES
from ..networks.untrained import fake_networks, network_bytes
from . import autoencoder, checkpoint_files, generator, pixel_decoder, pixel_objective
from .batches import PREFETCH_BATCHES
from .distributed import gathered_bytes
from .launch import cluster_resources
from .memory_plan import checkpoint_bytes, memory_plan_of
from .state import TrainState
from .step import train_step

UNTRAINED_JOBS = {
    "autoencoder": autoencoder.untrained_job,
    "pixel_decoder": pixel_objective.untrained_job,
    "generator": generator.untrained_job,
}
HELD_OUT_IMAGES = {
    "autoencoder": autoencoder.MAX_VALIDATION_IMAGES,
    "pixel_decoder": pixel_decoder.MAX_VALIDATION_IMAGES,
}


CHECKS = {
    "autoencoder": autoencoder.check_settings,
    "pixel_decoder": pixel_decoder.check_settings,
    "generator": generator.check_settings,
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training holds; the decoding of images is 0 for a training on latents."""

    step: dict[str, int]
    """A worker's largest step by name, on its device."""
    host: dict[str, int]
    """What a worker holds besides by name, on its host."""
    micro_batch: int
    """Crops of a micro-batch, which one task decodes."""
    decoded_ahead: int
    """Crops of all workers that wait in the object store at most."""


def resources(trainings: Iterable[TrainingSection]) -> dict[str, float]:
    """CPUs and GPUs that the trainings take at the same time, by Ray's names."""
    total: dict[str, float] = {"CPU": 0.0}
    for training in trainings:
        for name, value in cluster_resources(training).items():
            total[name] = total.get(name, 0.0) + value
    return total


def num_decode_tasks(training: TrainingSection, num_cpus: float) -> int:
    """How many tasks decode images at once where the workers share `num_cpus` with them."""
    free = num_cpus - training.num_workers * training.cpus_per_worker
    return max(1, int(free / DECODE_CPUS))


def training_of(recipe: Recipe, network: str) -> TrainingSection:
    """How the recipe trains `network`: autoencoder, pixel_decoder or generator."""
    training: TrainingSection = getattr(recipe, network).training
    return training


def check_settings(recipe: Recipe, network: str) -> None:
    """Raises RecipeError or TrainingError for settings that `network` cannot be trained with."""
    CHECKS[network](recipe)


def memory_of(recipe: Recipe, network: str) -> TrainingMemory:
    """What the training of `network` holds in its largest step, with every loss on.

    Raises StoreError for a generator's store, UserError where LPIPS has no weights here.
    """
    training = training_of(recipe, network).model_copy()
    training.precision = settled_precision(training.precision, training.use_gpu)
    size = _micro_batch(training)
    with torch.device("meta"):
        job, blank_batch = UNTRAINED_JOBS[network](recipe)
    as_on_a_gpu = fused_attention() if training.use_gpu else nullcontext()
    with fake_networks(*job.networks), as_on_a_gpu:
        batch = blank_batch(size)
        plan = memory_plan_of(job, training, batch)
    batch_bytes = sum(tensor.nbytes for tensor in batch.tensors.values())
    host = {"batches made ahead": (PREFETCH_BATCHES + 2) * batch_bytes}
    sharded = training.parallel == "fsdp" and training.fewest_workers > 1
    if training.use_gpu or sharded:
        host["network, whole for its file"] = network_bytes(job.model)
    saved = checkpoint_size(recipe, network)
    parts = checkpoint_parts(recipe, network, saved)
    if parts > 1 or checkpoint_files.in_background(training):
        host["checkpoint, a copy until it is written"] = saved // parts
    step = {**plan.parts, "kept for the backward pass": plan.kept}
    if sharded:
        for name in plan.parts:
            if name.startswith("model: "):
                step[name] = -(-step[name] // training.fewest_workers)
        step["model: layers that are gathered"] = gathered_bytes(job.model)
    if network not in HELD_OUT_IMAGES:
        return TrainingMemory(step, host, 0, 0)
    host["held-out images"] = HELD_OUT_IMAGES[network] * 3 * recipe.image_size**2
    waiting = WINDOW_BATCHES * training.num_workers * batch_bytes
    return TrainingMemory(step, host, batch_bytes, waiting)


def blank_step(
    recipe: Recipe, network: str, device: torch.device
) -> tuple[Callable[[], object], int]:
    """One optimizer step of the training of `network` on `device`, to be called and timed.

    It has initial weights, blank images, and one micro-batch, whose size is the second result.
    Raises as `memory_of` does.
    """
    training = training_of(recipe, network).model_copy()
    training.precision = settled_precision(training.precision, training.use_gpu)
    size = _micro_batch(training)
    with torch.device(device):
        job, blank_batch = UNTRAINED_JOBS[network](recipe)
        state, batch = TrainState(job.model, training, job.adversary), blank_batch(size)
    adversary = (job.adversary.module, job.adversary.loss) if job.adversary else ()
    step = partial(train_step, state, job.model, job.loss, [batch], training, *adversary)
    return step, size


def _micro_batch(training: TrainingSection) -> int:
    return max(1, training.batch_size // (training.num_workers * training.accumulation))


def checkpoint_size(recipe: Recipe, network: str) -> int:
    """Bytes of a checkpoint of the training of `network`. Raises as `memory_of` does."""
    with torch.device("meta"):
        job, _ = UNTRAINED_JOBS[network](recipe)
    trained = [job.model, *([job.adversary.module] if job.adversary else [])]
    return checkpoint_bytes(trained, training_of(recipe, network).ema_decay is not None)


def checkpoint_parts(recipe: Recipe, network: str, size: int) -> int:
    """Files in which all workers together write a checkpoint of `size` bytes."""
    training = training_of(recipe, network)
    return checkpoint_files.num_parts(training, training.num_workers, size)
