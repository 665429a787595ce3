"""Training steps of each network: images per second, share of the matrix rate, and other costs.

    python -m benchmarks.train [--networks autoencoder pixel_decoder dit starflow] [--steps 8]
                               [--device cuda] [KEY=VALUE ...]

Each network is trained by the trainers' own `train_step` on random tensors in memory. The matrix
rate is that of one large product of the same precision, measured before and after in the same run.
torch counts the floating-point operations: matrix products, convolutions and attention, without
what activation checkpointing computes again. The frozen share is that of the frozen networks'
forward passes in the time of a step. Generators are also fed from a latent store on disk by the
trainer's own feed: "from the store" is that rate divided by the rate from memory, and "waiting" is
the share of time spent waiting for data. Overrides are the recipe's, for example generator.size=XL
generator.training.batch_size=64.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import describe
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import (
    build_autoencoder,
    build_generator,
    build_pixel_decoder,
)
from fae.pipelines.training.autoencoder import autoencoder_job
from fae.pipelines.training.batches import Batch
from fae.pipelines.training.generator import generator_job
from fae.pipelines.training.job import Adversary, AdversaryLoss, LossFunction
from fae.pipelines.training.latent_feed import latent_feed
from fae.pipelines.training.pixel_objective import (
    Objective,
    make_adversary,
    pixel_decoder_job,
)
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import train_step
from fae_core.layers import num_parameters
from fae_core.precision import autocast, settled_precision

NETWORKS = ("autoencoder", "pixel_decoder", "dit", "starflow")
LATENT_SHAPE = (32, 16, 16)
STORE_ROWS = 2048
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
SMALL = (
    "autoencoder.training.batch_size=4",
    "pixel_decoder.size=S",
    "pixel_decoder.losses.perceptual=backbone",
    "pixel_decoder.losses.discriminator=backbone",
    "pixel_decoder.training.batch_size=4",
    "generator.size=S",
    "generator.training.batch_size=8",
)
"""Sizes for seconds on two CPU cores; the command line overrides them."""


@dataclass
class Case:
    """One network with its loss and the batches on which it is measured."""

    model: torch.nn.Module
    training: TrainingSection
    loss: LossFunction
    batch: Batch
    frozen: Callable[[Batch], Any] | None = None
    adversary: Adversary | None = None
    from_store: Iterator[Batch] | None = None


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large square product, the best of six."""
    side = MATRIX_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device, 1) for _ in range(6))
    return 2 * side**3 / best


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Mean wall-clock seconds of `work`; the device is synchronized before and after."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def image_batch(size: int, side: int, device: torch.device) -> Batch:
    """Random images uint8 [size, side, side, 3]."""
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8).to(device)
    return Batch(0, {"images": images}, list(range(size)), [str(i) for i in range(size)], 1.0, [])


def autoencoder_case(recipe: Recipe, device: torch.device) -> Case:
    backbone = backbone_of(recipe).to(device)
    training = recipe.autoencoder.training
    model = build_autoencoder(recipe.autoencoder, backbone.spec).to(device)
    job = autoencoder_job(recipe.autoencoder, recipe.seed, backbone, model)
    batch = image_batch(training.batch_size, recipe.image_size, device)
    return Case(model, training, job.loss, batch, lambda b: backbone(b["images"]))


def pixel_decoder_case(recipe: Recipe, device: torch.device) -> Case:
    """The stage `noisy` with all losses, the adversarial ones included."""
    backbone = backbone_of(recipe).to(device)
    section = recipe.pixel_decoder
    model = build_pixel_decoder(recipe.pixel_decoder, backbone.spec, recipe.image_size).to(device)
    judge = make_adversary(section.losses, backbone)
    judge = judge.to(device) if judge else None
    objective = Objective(section, recipe.seed, backbone, None, judge, section.noise_sigma)
    job = pixel_decoder_job(model, objective)
    batch = image_batch(section.training.batch_size, recipe.image_size, device)
    frozen = lambda b: backbone(b["images"])  # noqa: E731
    return Case(model, section.training, job.loss, batch, frozen, job.adversary)


def generator_case(recipe: Recipe, kind: str, folder: Path, device: torch.device) -> Case:
    section = recipe.generator.model_copy(update={"kind": kind})
    size = section.training.batch_size
    model = build_generator(section, LATENT_SHAPE).to(device)
    store = LatentStore.open(str(folder))
    feed = latent_feed(store, section, recipe.seed)(0, 0, 1, device)
    first = next(feed)
    job = generator_job(section, model)
    assert len(first.samples) == size // section.training.accumulation
    return Case(model, section.training, job.loss, first, from_store=feed)


def write_store(folder: Path, rows: int) -> None:
    """Write a complete store of random latents in shards of 256."""
    records = [ImageRecord(f"{i:06d}", f"/x/{i}", label=i % 1000) for i in range(rows)]
    plan = ensure_plan(str(folder), records, 256, {"autoencoder weights": "none"})
    random = np.random.default_rng(0)
    for shard in range(plan.num_shards):
        part = plan.shard(shard)
        values = {"mean": random.normal(size=(len(part), *LATENT_SHAPE)).astype(np.float16)}
        places = list(range(len(part)))
        write_shard(str(folder), shard, part, places, values, [], plan.fingerprint)
    commit(str(folder), plan, {})


def measure(name: str, case: Case, steps: int, rate: float, device: torch.device) -> list[str]:
    """One row of the table."""
    state = TrainState(case.model.train(), case.training, case.adversary)
    wrapped = case.model
    judge = case.adversary.module if case.adversary else None
    judge_loss: AdversaryLoss | None = case.adversary.loss if case.adversary else None
    if case.training.compile is True:
        wrapped.compile(dynamic=False)

    def step(batch: Batch) -> None:
        train_step(state, wrapped, case.loss, [batch], case.training, judge, judge_loss)

    step(case.batch)  # buffers, kernels and, where asked for, compilation
    with FlopCounterMode(display=False) as counter:
        step(case.batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size = len(case.batch.samples)
    duration = seconds(lambda: step(case.batch), device, steps)
    frozen = ""
    if case.frozen is not None:
        with autocast(case.training.precision, device), torch.no_grad():
            share = seconds(lambda: case.frozen and case.frozen(case.batch), device, 3) / duration
        frozen = f"{share:.2f}"
    ratio = waiting = ""
    if case.from_store is not None:
        waited = 0.0

        def fed() -> None:
            nonlocal waited
            started = time.perf_counter()
            batch = next(feed)
            waited += time.perf_counter() - started
            step(batch)

        feed = case.from_store
        fed_duration = seconds(fed, device, steps)
        again = seconds(lambda: step(case.batch), device, steps)
        duration = (duration + again) / 2  # before and after
        ratio = f"{duration / fed_duration:.3f}"
        waiting = f"{100 * waited / (fed_duration * steps):.2f} %"
    flops = counter.get_total_flops()
    memory = ""
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    return [
        name,
        f"{num_parameters(case.model) / 1e6:.1f}",
        str(size),
        f"{size / duration:.2f}",
        f"{flops / size / 1e9:.1f}",
        f"{flops / duration / rate:.2f}",
        frozen,
        ratio,
        waiting,
        memory,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each loop")
    parser.add_argument("--recipe", default="photos-dinov2s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = parser.parse_known_args()
    device = torch.device(arguments.device)
    recipe = load_recipe(arguments.recipe, [*SMALL, *overrides])
    rows = []
    precision = settled_precision(recipe.generator.training.precision, device.type == "cuda")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = matrix_rate(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), STORE_ROWS)
        for name in arguments.networks:
            torch.manual_seed(0)
            if name == "autoencoder":
                case = autoencoder_case(recipe, device)
            elif name == "pixel_decoder":
                case = pixel_decoder_case(recipe, device)
            else:
                case = generator_case(recipe, name, Path(folder), device)
            rows.append(measure(name, case, arguments.steps, rate, device))
            print("  ".join(rows[-1]), flush=True)
            del case
            gc.collect()  # what is compiled refers to itself, and would stay on the device
    after = matrix_rate(device, dtype)
    print(f"\n{describe()}")
    print(
        f"{dtype} product of {MATRIX_SIDE[device.type]}²: {rate / 1e12:.3f} TFLOP/s before, "
        f"{after / 1e12:.3f} after; {arguments.recipe} {' '.join([*SMALL, *overrides])}\n"
    )
    print(
        "| network | M parameters | batch | images/s | GFLOP an image | of the matrix rate "
        "| frozen share | from the store | waiting | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
