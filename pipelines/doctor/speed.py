"""How long a job will take: ten seconds of its own work on this machine, `--probe`.

The networks run with initial weights on blank images of the job's batch, on the device that the
recipe asks for; the first images of the source are decoded. Left out are reading from a distance,
validations, checkpoints, and the start of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import torch

from fae_core.errors import UserError
from fae_core.machine import num_cpus
from fae_core.precision import autocast, settled_precision
from fae_core.text import batch_length, untrained_text_encoder

from ..config import Recipe
from ..data import plan_source
from ..data.reading import load_crops
from ..data.records import records_of
from ..latents import LatentEncoder
from ..networks.text_encoder import text_spec
from ..networks.untrained import build_autoencoder, build_backbone
from ..runtime.progress import duration
from ..sampling.image_sampler import ImageSampler
from ..training import requirements
from .text_size import expected_text

PROBE_SECONDS = 4.0
"""Of one measurement, at least one call after one that warms up."""
DECODED_IMAGES = 32
SHORT_STEPS = (1, 3)
"""Sampler steps of two short draws, whose difference is the time of a step."""


@dataclass(frozen=True)
class Speed:
    """Images per second of a job's parts on this machine, and how many of each run at once."""

    what: str
    """The job in words: how many images, by whom."""
    num_images: int
    rates: dict[str, tuple[float, int]]
    """Name of the part -> (images/s of one process, processes at once)."""

    @property
    def seconds(self) -> float:
        """Of the whole job: its slowest part decides."""
        return self.num_images / min(rate * count for rate, count in self.rates.values())


def speed_of(recipe: Recipe, job: str) -> Speed:
    """Of `precompute`, `precompute_text`, `sample`, or training: `autoencoder`, `pixel_decoder` or
    `generator`.

    Raises UserError where the job wants a GPU and this machine has none, and what the job's
    networks and source raise.
    """
    if job == "precompute":
        return _precompute(recipe)
    if job == "precompute_text":
        return _precompute_text(recipe)
    return _sample(recipe) if job == "sample" else _training(recipe, job)


def speed_text(speed: Speed) -> str:
    """Lines for people."""
    lines = [f"speed on this machine, measured for {PROBE_SECONDS:g} s a part"]
    for name, (rate, count) in speed.rates.items():
        lines.append(f"  {rate:>9,.1f}  images/s, {name}" + (f", {count} at once" * (count > 1)))
    lines.append(f"{speed.what}: about {duration(speed.seconds)}")
    return "\n".join(lines)


def _training(recipe: Recipe, network: str) -> Speed:
    training = requirements.training_of(recipe, network)
    requirements.check_settings(recipe, network)
    device = _device(training.use_gpu)
    torch.set_num_threads(training.threads_per_worker or _share(training.num_workers))
    step, size = requirements.blank_step(recipe, network, device)
    rate = size / _seconds(step, device)
    rates = {"training": (rate, training.num_workers)}
    if network in requirements.HELD_OUT_IMAGES:
        table = plan_source(recipe.data).table
        num_tasks = requirements.num_decode_tasks(training, num_cpus())
        rates["decoding"] = (_decode_rate(recipe, table), num_tasks)
    what = f"{training.steps:,} steps of {training.batch_size:,} images"
    return Speed(what, training.steps * training.batch_size, rates)


def _precompute(recipe: Recipe) -> Speed:
    section, side = recipe.precompute, recipe.image_size
    table = plan_source(recipe.data).table
    device = _device(section.gpus_per_actor > 0)
    torch.set_num_threads(section.threads_per_actor or _share(section.num_actors))
    backbone = build_backbone(recipe.backbone)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    precision = settled_precision(section.precision, section.gpus_per_actor > 0)
    encoder = LatentEncoder(
        backbone.to(device), autoencoder.to(device), "", list(section.columns), precision, device
    )
    size = min(section.batch_size, section.shard_size)
    crops = torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        rate = size / _seconds(lambda: encoder.encode_batch(crops), device)
    free = num_cpus() - section.num_actors * section.cpus_per_actor
    tasks = max(1, int(free / section.cpus_per_decode))
    rates = {
        "encoding": (rate, section.num_actors),
        "decoding": (_decode_rate(recipe, table), tasks),
    }
    return Speed(f"{len(table):,} images", len(table), rates)


def _precompute_text(recipe: Recipe) -> Speed:
    """The encoder on a batch of captions of mean length."""
    section, spec, expected = recipe.precompute, text_spec(recipe.text), expected_text(recipe)
    device = _device(section.gpus_per_actor > 0)
    torch.set_num_threads(section.threads_per_actor or _share(section.num_actors))
    encoder = untrained_text_encoder(spec).to(device)
    longest = batch_length(-(-expected.tokens // max(1, expected.captions)), spec.max_length)
    ids = torch.zeros(section.batch_size, longest, dtype=torch.int64, device=device)
    with autocast(settled_precision(section.precision, section.gpus_per_actor > 0), device):
        rate = section.batch_size / _seconds(lambda: encoder(ids, ids == 0), device)
    rate *= expected.rows / max(1, expected.captions)
    rates = {"encoding": (rate, section.num_actors)}
    return Speed(f"captions of {expected.rows:,} images", expected.rows, rates)


def _sample(recipe: Recipe) -> Speed:
    section = recipe.sample
    device = _device(section.gpus_per_actor > 0)
    plain = recipe.model_copy(deep=True)
    plain.sample.compile = False
    sampler, size = ImageSampler(plain, device.type), min(section.batch_size, section.shard_size)
    indices, seconds = list(range(size)), []
    for steps in SHORT_STEPS:
        plain.sample.num_steps = steps
        seconds.append(_seconds(partial(sampler, indices, sampler.labels(indices)), device))
    fewer, more = SHORT_STEPS
    step = max(0.0, (seconds[1] - seconds[0]) / (more - fewer))
    rate = size / (seconds[0] + step * (section.num_steps - fewer))
    what = f"{section.num_images:,} images of {section.num_steps} steps"
    return Speed(what, section.num_images, {"drawing": (rate, section.num_actors)})


def _decode_rate(recipe: Recipe, table: pa.Table) -> float:
    """Images per second of one process that reads and crops the first images of a plan."""
    some = records_of(table.slice(0, DECODED_IMAGES))
    decode = partial(load_crops, some, recipe.image_size, recipe.data)
    return len(some) / _seconds(decode, torch.device("cpu"))


def _share(processes: int) -> int:
    """Threads of each of so many processes on this machine's cores."""
    return max(1, num_cpus() // processes)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a call, over PROBE_SECONDS, after one call that warms up."""
    call()
    _wait(device)
    started, calls, passed = time.monotonic(), 0, 0.0
    while passed < PROBE_SECONDS:
        call()
        _wait(device)
        calls, passed = calls + 1, time.monotonic() - started
    return passed / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(use_gpu: bool) -> torch.device:
    if use_gpu and not torch.cuda.is_available():
        raise UserError(
            "--probe measures on this machine, which has no GPU; the recipe wants one. Run it on a "
            "machine like those of the cluster."
        )
    return torch.device("cuda" if use_gpu else "cpu")
